"""Make a corpus: raw files in, Parquet with a report out. Run with --help, or a subcommand and --help."""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import tyro

from palate import config as configs
from palate.artifacts import Artifact, ArtifactError
from palate.corpora import jsonl, lamp
from palate.corpora.preparation import PrepareConfig, Recipe, prepare
from palate.corpora.streams import CorpusError
from palate.corpora.worlds import personas

Command = (
    Annotated[lamp.LampConfig, tyro.conf.subcommand("lamp")]
    | Annotated[jsonl.JsonlConfig, tyro.conf.subcommand("jsonl")]
    | Annotated[personas.PersonasConfig, tyro.conf.subcommand("personas")]
)


def from_records(recipe: Callable[[Any], Recipe], config: PrepareConfig) -> Artifact:
    return prepare(recipe(config), config)


MAKE: dict[type, Callable[[Any], Artifact]] = {
    lamp.LampConfig: partial(from_records, lamp.recipe),
    jsonl.JsonlConfig: partial(from_records, jsonl.recipe),
    personas.PersonasConfig: personas.prepare,
}


def main() -> None:
    config = configs.parse(Command, __doc__)
    try:
        corpus = MAKE[type(config)](config)
    except (CorpusError, ArtifactError) as error:
        raise SystemExit(f"prepare: {error}") from None
    print(f"{corpus.url}: {corpus.summary}")


if __name__ == "__main__":
    main()
