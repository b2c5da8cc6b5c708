"""A program that a test runs: the three trainings on a cluster of two nodes, and each in one process.

Two ranks cannot be on one node, because each node has one CPU and each rank takes one. Prints a line of JSON with the
nodes of each training's ranks and by how much its results differ from those of one process.
"""

import json
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
from ray.cluster_utils import Cluster
from safetensors.torch import load_file

import toy_lists
import toy_runs
from palate import artifacts
from palate.card import stages as card
from palate.corpora.worlds import personas
from palate.distributed.launch import launch
from palate.lpo import stages as lpo
from palate.models.diffusion import load_diffusion
from palate.serving.answers import sample_answers
from palate.training import logging as run_logs
from palate.training.parallel import World
from palate.unihetero import stages as unihetero
from toy_unihetero import build_parts

Differences = dict[str, float]


def main(folder: Path) -> None:
    trainings = {"card": prepare_card(folder), "lpo": prepare_lpo(folder), "unihetero": prepare_unihetero(folder)}
    for name, (worker, settings, _) in trainings.items():
        worker(settings(folder / name / "alone"), World())
    cluster = Cluster(initialize_head=True, connect=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    found = {}
    for name, (worker, settings, compare) in trainings.items():
        config = settings(folder / name / "two")
        launch(partial(placed, worker), config, launcher="ray", workers=2, folder=config.out)
        nodes = [path.read_text() for path in sorted(Path(config.out).glob("node-*"))]
        found[name] = {"nodes": nodes, **compare(folder / name / "two", folder / name / "alone")}
    print(json.dumps(found))
    ray.shutdown()
    cluster.shutdown()


def placed(worker: Callable[[Any, World], Any], config: Any, world: World) -> None:
    """``worker``, leaving the id of the node where this rank is in the run's folder."""
    Path(config.out).mkdir(parents=True, exist_ok=True)
    (Path(config.out) / f"node-{world.rank}").write_text(ray.get_runtime_context().get_node_id())
    worker(config, world)


def prepare_card(folder: Path) -> tuple:
    people = personas.PersonasConfig(out=str(folder / "personas"), people=8, items=6, questions=1)
    corpus = personas.prepare(people).url
    return partial(card.pipeline, sampler=sample_answers), partial(toy_runs.card, corpus), compare_card


def prepare_lpo(folder: Path) -> tuple:
    lists = toy_lists.lists(folder / "lists")
    load_diffusion("shapes").pipeline.save_pretrained(folder / "base")
    return lpo.pipeline, partial(toy_runs.lpo, lists.url, model=str(folder / "base")), compare_lpo


def prepare_unihetero(folder: Path) -> tuple:
    return unihetero.pipeline, partial(toy_runs.unihetero, build_parts(folder / "parts")), compare_unihetero


def compare_card(two: Path, alone: Path) -> Differences:
    files = [f"adapters/cluster-{number:03d}/adapter_model.safetensors" for number in range(2)]
    heads = [card.read_vectors(artifacts.open_artifact(run / "head", card.HEAD)) for run in (two, alone)]
    assert heads[0].keys() == heads[1].keys()
    return {
        "weights": largest((load_file(two / file), load_file(alone / file)) for file in files),
        "vectors": largest([tuple(heads)]),
    }


def compare_lpo(two: Path, alone: Path) -> Differences:
    (file,) = (path.relative_to(alone) for path in (alone / "tuned" / "lora").glob("*.safetensors"))
    return {"weights": largest([(load_file(two / file), load_file(alone / file))]), **losses(two, alone)}


def compare_unihetero(two: Path, alone: Path) -> Differences:
    file = "model/model.safetensors"
    return {"weights": largest([(load_file(two / file), load_file(alone / file))]), **losses(two, alone)}


def losses(two: Path, alone: Path) -> Differences:
    """The largest relative difference of a step's loss; the batches are the same, or this fails."""
    rows = [run_logs.read(run / "training") for run in (two, alone)]
    assert [row["fingerprint"] for row in rows[0]] == [row["fingerprint"] for row in rows[1]]
    return {"loss": max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(*rows, strict=True))}


def largest(pairs: Iterable[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]) -> float:
    """The largest difference of any number, relative to the largest number of its tensor."""
    found = 0.0
    for one, other in pairs:
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            scale = max(other[name].abs().max().item(), 1e-12)
            found = max(found, (tensor - other[name]).abs().max().item() / scale)
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
