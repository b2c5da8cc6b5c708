"""Every pipeline whole, as its jobs run it, with every path a URL: it makes what it makes on a local disk."""

import json
import math
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from palate import artifacts
from palate.artifacts import Artifact

JOBS = Path(__file__).resolve().parents[2] / "jobs"
# Scripts of jobs/ with their flags; {at} is the place of everything.
TEXT = """
prepare.py personas --out {at}/corpus --people 8 --items 6 --questions 1
card.py --corpus {at}/corpus --out {at}/run --model tiny --clusters 2 --max-prompt-tokens 200 --max-answer-tokens 12
  --rank 2 --epochs 1 --batch 8 --checkpoint-every 3 --people-per-shard 3 --top-k 10 --cluster-texts 0 --other-texts 1
  --width 4 --head-epochs 2 --head-precision 60 --vector-deviation 1
evaluate.py text --run {at}/run --corpus {at}/corpus --out {at}/evaluation --users all --max-users 4
  --systems base cluster card card-permuted --negatives 1 --generation-draws 1 --max-new-tokens 8 --resamples 200
"""
IMAGES = """
prepare.py shapes --out {at}/lists --scenes 40 --pool 4 --lists 24 --examples 2 --tests 2 --lengths 4 --groups bold
  --users 4
lpo.py --lists {at}/lists --out {at}/base --train-on images --objective denoising --weights full --resolution 16
  --latent-dtype float32 --steps 3 --batch 4 --checkpoint-every 2 --grid 0
lpo.py --lists {at}/lists --out {at}/run --model {at}/base/tuned/pipeline --kl-beta 50 --resolution 16
  --latent-dtype float32 --steps 3 --batch 4 --checkpoint-every 2 --personal examples --sampler-steps 2 --grid 2
evaluate.py images --run tuned={at}/run --out {at}/evaluation --corpus {at}/lists --images 1 --max-prompts 2
  --sampler-steps 2 --drift-images 4 --drift-draws 1 --resamples 200
"""
UNIFIED = """
prepare.py scenes --out {at}/scenes --encoder 64 --train 32 --validation 2 --test 12 --objects 1
prepare.py captions --input {at}/scenes/train/*.tar --out {at}/index
unihetero.py parts --corpus {at}/scenes --out {at}/parts --encoder-steps 20 --autoencoder-steps 20 --width 16
  --layers 1 --language-width 16 --language-layers 2
unihetero.py train --corpus {at}/index --out {at}/run --language {at}/parts/language --vision {at}/parts/vision
  --vae {at}/parts/vae --arm decoder --image-tokens 16 --merge concatenate --steps 3 --batch 4 --micro-batch 4
  --checkpoint-every 2
evaluate.py vision --run unified={at}/run --out {at}/evaluation --questions {at}/scenes/questions.tsv --resamples 200
"""


def run(commands: str, at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts in this process, which has imported what they need."""
    for command in commands.strip().replace("\n  ", " ").splitlines():
        script, *flags = command.replace("{at}", at).split()
        monkeypatch.setattr(sys, "argv", [script, *flags])
        runpy.run_path(str(JOBS / script), run_name="__main__")


def found_at(place: str) -> dict[str, Artifact]:
    """The finished artifacts under a place, by their path there."""
    filesystem, root = artifacts.locate(place)
    files = (str(path).removeprefix(f"{root}/") for path in filesystem.find(root))
    folders = sorted(path.rpartition("/")[0] for path in files if path.endswith("/manifest.json"))
    return {folder: artifacts.open_artifact(f"{place}/{folder}").verify() for folder in folders}


def require_equal(local: Artifact, remote: Artifact, path: str, places: Sequence[str]) -> None:
    """Tensors, tables and the numbers of JSON by their values, other files by their bytes. Reports, in words and plots,
    call a model by its place; their numbers are in their JSON."""
    one, other = local.local(path), remote.local(path)
    match one.suffix:
        case ".safetensors":
            ours, theirs = load_file(one), load_file(other)
            assert ours.keys() == theirs.keys(), path
            assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == [], path
        case ".parquet":
            table = pq.read_table(other)
            for number, field in enumerate(table.schema):
                if pa.types.is_string(field.type):  # an index names its shards
                    table = table.set_column(number, field, pc.replace_substring(table[number], places[1], places[0]))
            assert pq.read_table(one).equals(table), path
        case ".json":
            here, there = places
            require_same_numbers(json.loads(one.read_text()), json.loads(other.read_text().replace(there, here)), path)
        case ".md" | ".html" | ".svg":
            pass
        case _:
            assert local.kind.endswith("report") or one.read_bytes() == other.read_bytes(), path


def require_same_numbers(ours: Any, theirs: Any, where: str) -> None:
    """How long it took, and hashes of what names a place, are none of the result."""
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for name in ours:
            if "second" not in name:
                require_same_numbers(ours[name], theirs[name], f"{where}/{name}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), where
        for number, pair in enumerate(zip(ours, theirs, strict=True)):
            require_same_numbers(*pair, f"{where}/{number}")
    elif isinstance(ours, float):
        assert ours == theirs or (math.isnan(ours) and math.isnan(theirs)), where
    elif not isinstance(ours, str):
        assert ours == theirs, where


@pytest.mark.slow
@pytest.mark.parametrize("commands", [TEXT, IMAGES, UNIFIED], ids=["text", "images", "unified"])
def test_a_pipeline_on_object_storage_makes_what_it_makes_on_a_disk(commands, tmp_path, s3_url, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = [str(tmp_path / "disk"), f"{s3_url}/all"]
    for place in places:
        run(commands, place, monkeypatch)
    local, remote = map(found_at, places)
    assert len(local) >= 5
    assert local.keys() == remote.keys()
    for name, ours in local.items():
        theirs = remote[name]
        assert ours.paths() == theirs.paths(), name
        for path in ours.paths():
            require_equal(ours, theirs, path, places)
        require_same_numbers(ours.summary, theirs.summary, name)
    # Nothing was written elsewhere: what is made of a URL must not land in a folder that is called so.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "palate-cache"]
