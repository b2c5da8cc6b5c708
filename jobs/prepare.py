"""Make a corpus: raw files in, Parquet with a report out. Run with --help, or a subcommand and --help."""

from typing import Annotated

import tyro

from palate import config as configs
from palate.corpora import jsonl, lamp
from palate.corpora.preparation import prepare
from palate.corpora.streams import CorpusError

Command = (
    Annotated[lamp.LampConfig, tyro.conf.subcommand("lamp")]
    | Annotated[jsonl.JsonlConfig, tyro.conf.subcommand("jsonl")]
)
RECIPES = {lamp.LampConfig: lamp.recipe, jsonl.JsonlConfig: jsonl.recipe}


def main() -> None:
    config = configs.parse(Command, __doc__)
    try:
        corpus = prepare(RECIPES[type(config)](config), config)
    except CorpusError as error:
        raise SystemExit(f"prepare: {error}") from None
    print(f"{corpus.url}: {corpus.summary}")


if __name__ == "__main__":
    main()
