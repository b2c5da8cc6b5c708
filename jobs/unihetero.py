"""Pretrain a unified vision-language model (UniHetero), and its experiment. Run with --help, or a subcommand and
--help."""

from dataclasses import dataclass

from palate import config as configs
from palate.artifacts import ArtifactError, os_errors
from palate.config import scale
from palate.distributed.launch import launch_job
from palate.training.guards import TrainingStopped
from palate.unihetero.parts import PartsConfig, make_parts
from palate.unihetero.plan import PlanConfig
from palate.unihetero.stages import TrainConfig, pipeline, start_over
from palate.unihetero.sweep import SweepConfig, read_runs, sweep


@dataclass(frozen=True)
class ReportConfig:
    """Write the report of an experiment from the runs that are finished."""

    experiment: str
    """The sweep's --out."""
    out: str = scale()
    """Folder or URL of the report."""


def train(config: TrainConfig) -> None:
    made = launch_job(pipeline, config, once=start_over)
    print(f"model: {made.url}")


def parts(config: PartsConfig) -> None:
    made = make_parts(config)
    for name, value in made.summary.items():
        print(f"  {name:>30}: {value:.3f}")


def experiment(config: SweepConfig) -> None:
    sweep(config)
    report(ReportConfig(config.out, out=f"{config.out}/report"))


def report(config: ReportConfig) -> None:
    from palate.evaluation import claims

    found = claims.analyse(read_runs(config.experiment))
    claims.write(found, config.out)
    for verdict in found.verdicts:
        print(verdict)
    print(f"report: {config.out}/report.md")


def plan(config: PlanConfig) -> None:
    from palate.unihetero.plan import markdown
    from palate.unihetero.plan import plan as make

    print(markdown(make(config)))


COMMANDS = {
    "train": TrainConfig,
    "parts": PartsConfig,
    "sweep": SweepConfig,
    "report": ReportConfig,
    "plan": PlanConfig,
}
RUN = {TrainConfig: train, PartsConfig: parts, SweepConfig: experiment, ReportConfig: report, PlanConfig: plan}


def main() -> None:
    config = configs.parse_command(COMMANDS, __doc__)
    try:
        with os_errors():
            RUN[type(config)](config)
    except (ArtifactError, TrainingStopped, ValueError, OSError) as error:
        raise SystemExit(f"unihetero: {error}") from None


if __name__ == "__main__":
    main()
