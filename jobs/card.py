"""Train CARD on a prepared text corpus: style, clusters, adapters, contrast, personal vectors. Run with --help."""

from functools import partial

from palate import config as configs
from palate.artifacts import ArtifactError
from palate.card.stages import CardConfig, pipeline, start_over
from palate.distributed.launch import launch_job
from palate.serving.answers import sample_answers
from palate.training.guards import TrainingStopped


def main() -> None:
    config = configs.parse(CardConfig, __doc__)
    worker = partial(pipeline, sampler=sample_answers)
    try:
        launch_job(worker, config, once=start_over)
    except (ArtifactError, TrainingStopped, ValueError, OSError) as error:
        raise SystemExit(f"card: {error}") from None


if __name__ == "__main__":
    main()
