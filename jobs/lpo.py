"""Tune an image generator on ranked lists (Diffusion-LPO): encode, train, write for diffusers. Run with --help."""

from functools import partial

from palate import config as configs
from palate.artifacts import ArtifactError
from palate.distributed.launch import launch_job
from palate.lpo.stages import LpoConfig, encode_lists, pipeline, start_over
from palate.training.guards import TrainingStopped


def begin(config: LpoConfig) -> None:
    """What is done once, before any rank starts. With Ray, its actors encode; else the first rank does."""
    start_over(config)
    if config.launcher == "ray":
        import ray

        from palate.distributed.prepare import run_with_actors

        if not ray.is_initialized():
            ray.init()
        gpu = ray.cluster_resources().get("GPU", 0) > 0 if config.gpu is None else config.gpu
        runner = partial(run_with_actors, gpu=gpu, at_least=config.workers)
        encode_lists(config, "cuda" if gpu else "cpu", runner)


def main() -> None:
    config = configs.parse(LpoConfig, __doc__)
    try:
        launch_job(pipeline, config, once=begin)
    except (ArtifactError, TrainingStopped, ValueError, OSError) as error:
        raise SystemExit(f"lpo: {error}") from None


if __name__ == "__main__":
    main()
