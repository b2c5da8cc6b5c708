"""Evaluate a finished run beside its baselines and controls. Run with --help, or a subcommand and --help."""

import tyro

from palate.artifacts import ArtifactError, open_artifact
from palate.corpora.schema import TEXT_CORPUS
from palate.evaluation.comparison import Comparison, TextConfig
from palate.evaluation.subject import read_run
from palate.evaluation.text_report import make_report


def main() -> None:
    config = tyro.extras.subcommand_cli_from_dict({"text": TextConfig}, description=__doc__)
    try:
        corpus = open_artifact(config.corpus, TEXT_CORPUS)
        report = make_report(Comparison(config, corpus, read_run(config.run, corpus)))
    except (ArtifactError, ValueError, OSError) as error:
        raise SystemExit(f"evaluate: {error}") from None
    if report.summary:
        print("own minus permuted vectors, with 95% intervals:")
    for name, (value, low, high) in report.summary.items():
        print(f"  {name.partition('/')[0]:>20}: {value:+.3f} [{low:+.3f}, {high:+.3f}]")
    print(f"report: {report.url}/report.md")


if __name__ == "__main__":
    main()
