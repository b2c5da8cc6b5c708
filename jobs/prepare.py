"""Make a corpus: raw files in, Parquet with a report out. Run with --help, or a subcommand and --help."""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

from tyro.conf import subcommand

from palate import config as configs
from palate.artifacts import Artifact, ArtifactError, os_errors
from palate.corpora import captions, git, jsonl, lamp, longlamp
from palate.corpora.preparation import PrepareConfig, Recipe, Runner, prepare, run_local
from palate.corpora.streams import CorpusError
from palate.corpora.worlds import personas, scenes, shapes
from palate.lpo import preparation as rankings
from palate.users import preparation as feedback

Command = (
    Annotated[lamp.LampConfig, subcommand("lamp")]
    | Annotated[longlamp.LongLampConfig, subcommand("longlamp")]
    | Annotated[jsonl.JsonlConfig, subcommand("jsonl")]
    | Annotated[git.GitConfig, subcommand("git")]
    | Annotated[rankings.RankingsConfig, subcommand("rankings")]
    | Annotated[feedback.FeedbackConfig, subcommand("feedback")]
    | Annotated[captions.CaptionsConfig, subcommand("captions")]
    | Annotated[personas.PersonasConfig, subcommand("personas")]
    | Annotated[shapes.ShapesConfig, subcommand("shapes")]
    | Annotated[scenes.ScenesConfig, subcommand("scenes")]
)


def from_records(recipe: Callable[[Any], Recipe], config: PrepareConfig) -> Artifact:
    return prepare(recipe(config), config, runner_for(config))


def from_rankings(config: rankings.RankingsConfig) -> Artifact:
    return rankings.prepare(config, runner_for(config))


def from_feedback(config: feedback.FeedbackConfig) -> Artifact:
    return feedback.prepare(config, runner_for(config))


def from_captions(config: captions.CaptionsConfig) -> Artifact:
    return captions.prepare(config, runner_for(config))


def runner_for(config: PrepareConfig) -> Runner:
    runner = run_local
    if config.launcher == "ray":
        from palate.distributed.prepare import run_with_ray as runner
    return runner


MAKE: dict[type, Callable[[Any], Artifact]] = {
    lamp.LampConfig: partial(from_records, lamp.recipe),
    longlamp.LongLampConfig: partial(from_records, longlamp.recipe),
    jsonl.JsonlConfig: partial(from_records, jsonl.recipe),
    git.GitConfig: partial(from_records, git.recipe),
    rankings.RankingsConfig: from_rankings,
    feedback.FeedbackConfig: from_feedback,
    captions.CaptionsConfig: from_captions,
    personas.PersonasConfig: personas.prepare,
    shapes.ShapesConfig: shapes.prepare,
    scenes.ScenesConfig: scenes.prepare,
}


def main() -> None:
    config = configs.parse(Command, __doc__)
    try:
        with os_errors():
            corpus = MAKE[type(config)](config)
    except (CorpusError, ArtifactError, OSError) as error:
        raise SystemExit(f"prepare: {error}") from None
    print(f"{corpus.url}:")
    for name, value in corpus.summary.items():
        print(f"  {name}: {value}")


if __name__ == "__main__":
    main()
