"""A small CARD run from nothing to answers in two people's manner, with a report. `make demo` runs it."""

from dataclasses import dataclass
from functools import partial

from palate import config as configs
from palate import progress
from palate.artifacts import ArtifactError, join
from palate.card.adaptation import AdaptConfig
from palate.card.heads import PreferConfig
from palate.card.stages import CardConfig, PromptConfig, pipeline, start_over
from palate.config import scale
from palate.corpora.worlds import personas
from palate.distributed.launch import launch
from palate.evaluation.comparison import Comparison, TextConfig
from palate.evaluation.subject import read_run
from palate.evaluation.text_report import make_report
from palate.serving.answers import sample_answers
from palate.training.guards import TrainingStopped


@dataclass(frozen=True)
class DemoConfig:
    """Sized for two cores and five minutes; a GPU, or patience, takes more of everything."""

    out: str = scale("runs/demo")
    """Folder of the corpus, the run and the evaluation."""
    model: str = "smollm2"
    """Base model."""
    people: int = 40
    """Writers in the synthetic corpus."""
    items: int = 12
    """Texts that each has written before."""
    epochs: int = 1
    """Passes of the adapters over half of these texts."""
    asked: int = 10
    """People who are asked two questions each in the evaluation."""
    fresh: bool = scale(False)
    """Discard what --out holds and begin anew."""


def main() -> None:
    config = configs.parse(DemoConfig, __doc__)
    if config.asked < 1:
        raise SystemExit(f"demo: --asked must be at least 1, got {config.asked}")
    try:
        with progress.stage("demo"):
            comparison = run(config)
            with progress.stage("evaluate"):
                report = make_report(comparison)
    except (ArtifactError, TrainingStopped, ValueError, OSError) as error:
        raise SystemExit(f"demo: {error}") from None
    show(comparison)
    print(f"\nreport: {report.url}/report.md")


def run(config: DemoConfig) -> Comparison:
    """Corpus, CARD and what the evaluation compares."""
    with progress.stage("corpus"):
        corpus = personas.prepare(
            personas.PersonasConfig(
                out=join(config.out, "corpus"),
                people=config.people,
                items=config.items,
                questions=2,
                fresh=config.fresh,
            )
        )
    card = CardConfig(
        corpus=corpus.url,
        out=join(config.out, "card"),
        model=config.model,
        prompt=PromptConfig(max_prompt_tokens=160, max_answer_tokens=48),
        adapt=AdaptConfig(epochs=config.epochs, learning_rate=2e-3),
        prefer=PreferConfig(head_precision=(60.0,), vector_deviation=(1.0,)),
        fresh=config.fresh,
    )
    launch(partial(pipeline, sampler=sample_answers), card, launcher="local", folder=card.out, once=start_over)
    text = TextConfig(
        run=card.out,
        corpus=corpus.url,
        out=join(config.out, "evaluation"),
        users="all",
        systems=("base", "cluster", "card", "card-permuted"),
        max_users=config.asked,
        generation_draws=1,
        negatives=2,
        max_new_tokens=48,
        fresh=config.fresh,
    )
    return Comparison(text, corpus, read_run(card.out, corpus))


def show(comparison: Comparison) -> None:
    """Print what the base model and CARD answer two people, beside what they themselves wrote."""
    answers = {spec.name: comparison.answers(spec)[0] for spec in comparison.specs}
    shown = list({case.question.user_id: case for case in comparison.cases}.values())[:2]
    for case in shown:
        question = case.question
        print(f"\n{question.user_id} was asked: {question.input}")
        for label, text in (
            ("base model", answers["base"][question.question_id]),
            ("personalized", answers["card"][question.question_id]),
            ("wrote", case.gold),
        ):
            print(f"  {label:>12}: {' '.join(text.split())}")


if __name__ == "__main__":
    main()
