"""Evaluate finished runs beside their baselines and controls. Run with --help, or a subcommand and --help."""

from palate import config as configs
from palate.artifacts import ArtifactError, open_artifact, os_errors
from palate.corpora.schema import TEXT_CORPUS
from palate.evaluation import images, vision
from palate.evaluation.comparison import Comparison, TextConfig
from palate.evaluation.images import ImagesConfig
from palate.evaluation.subject import read_run
from palate.evaluation.text_report import make_report
from palate.evaluation.vision import VisionConfig


def main() -> None:
    # Flags without the names of nested settings, as everywhere else.
    subcommands = {"text": TextConfig, "images": ImagesConfig, "vision": VisionConfig}
    config = configs.parse_command(subcommands, __doc__)
    try:
        with os_errors():
            EVALUATE[type(config)](config)
    except (ArtifactError, ValueError, OSError) as error:
        raise SystemExit(f"evaluate: {error}") from None


def evaluate_text(config: TextConfig) -> None:
    corpus = open_artifact(config.corpus, TEXT_CORPUS)
    report = make_report(Comparison(config, corpus, read_run(config.run, corpus)))
    if report.summary:
        print("own minus permuted vectors, with 95% intervals:")
    for name, (value, low, high) in report.summary.items():
        print(f"  {name.partition('/')[0]:>20}: {value:+.3f} [{low:+.3f}, {high:+.3f}]")
    print(f"report: {report.url}/report.md")


def evaluate_images(config: ImagesConfig) -> None:
    report = images.make_report(images.Comparison(config))
    print("win rates at the same seeds, with 95% intervals:")
    for name, (value, low, high) in report.summary.items():
        print(f"  {name:>40}: {value:.3f} [{low:.3f}, {high:.3f}]")
    print(f"report: {report.url}/report.md")


def evaluate_vision(config: VisionConfig) -> None:
    report = vision.make_report(config)
    print("accuracy by likelihood, with 95% intervals over images:")
    for name, (value, low, high) in report.summary.items():
        print(f"  {name:>40}: {value:.3f} [{low:.3f}, {high:.3f}]")
    print(f"report: {report.url}/report.md")


EVALUATE = {TextConfig: evaluate_text, ImagesConfig: evaluate_images, VisionConfig: evaluate_vision}

if __name__ == "__main__":
    main()
