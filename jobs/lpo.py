"""Tune an image generator on ranked lists (Diffusion-LPO): encode, train, write for diffusers. Run with --help."""

from palate import config as configs
from palate.artifacts import ArtifactError
from palate.distributed.launch import launch
from palate.lpo.stages import LpoConfig, pipeline, start_over
from palate.training.guards import TrainingStopped


def main() -> None:
    config = configs.parse(LpoConfig, __doc__)
    try:
        launch(
            pipeline,
            config,
            launcher=config.launcher,
            workers=config.workers,
            folder=config.out,
            once=start_over,
        )
    except (ArtifactError, TrainingStopped, ValueError, OSError) as error:
        raise SystemExit(f"lpo: {error}") from None


if __name__ == "__main__":
    main()
