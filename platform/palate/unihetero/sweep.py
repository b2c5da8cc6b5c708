"""The experiment: arms and seeds on the same images in the same order, each run measured at log-spaced sample counts.

    OUT/calibration/ARM      short runs that tell the losses' weights
    OUT/runs/ARM-SEED        runs (see ``runs``)
    OUT/experiment.json      settings, weights, what is finished

Runs are independent, so a sweep that was stopped goes on with those that are not done, and more seeds or arms can be
added.
"""

import ctypes
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch

from palate import artifacts, progress
from palate.artifacts import Artifact, ArtifactMismatch
from palate.config import identity, require_at_least, scale, to_dict
from palate.corpora import vqa
from palate.unihetero import parts
from palate.unihetero.arms import ARMS
from palate.unihetero.objectives import ObjectiveConfig
from palate.unihetero.runs import KIND, Experiment, RunConfig, calibrated, run

MAIN = ("understanding", "embedding", "encoder", "pixel", "decoder", "isolated")
CONTROLS = ("capacity", "shuffled", "unshifted", "curriculum", "random:understanding", "random:embedding")
BASELINE = "understanding"
CALIBRATED = ("embedding", "encoder", "pixel", "decoder", "isolated", "open", "curriculum", "unshifted", "shuffled")
# Whose weights an arm takes that is a control of another.
LIKE = {
    "capacity": "embedding",
    "shuffled": "embedding",
    "unshifted": "embedding",
    "curriculum": "embedding",
    "open": "embedding",
    "random:embedding": "embedding",
}


@dataclass(frozen=True)
class SweepConfig:
    """Arms x seeds on one corpus."""

    corpus: str
    """Captioned images with questions (jobs/prepare.py scenes): a folder or URL."""
    parts: str
    """Their parts (jobs/unihetero.py parts)."""
    out: str = scale()
    """Folder or URL of the experiment."""
    runs: RunConfig = field(default_factory=RunConfig)
    arms: tuple[str, ...] = scale(MAIN)
    """Compared over ``seeds`` seeds."""
    controls: tuple[str, ...] = scale(CONTROLS)
    """Compared over ``control_seeds`` seeds; random:ARM is an arm on an encoder of random weights."""
    seeds: int = scale(5)
    """Of each arm: ``first_seed``, ``first_seed`` + 1, ..."""
    control_seeds: int = scale(3)
    """Of each control, from the same first one."""
    first_seed: int = scale(0)
    """Later ones, into an ``out`` of their own, confirm what earlier ones suggest."""
    gradient_ratio: float = 0.2
    """Norm that a loss's gradient in projector and language model has, over that of the text's: weights are
    set so that all arms have it, by short runs with a seed of their own. 0: weights as given."""
    calibration_samples: int = 6_400
    """Of each short run."""
    baseline_extra: float = 0.7
    """The baseline goes on for this share of the samples more, to be compared at equal FLOPs."""
    workers: int = scale(2)
    """Processes, of one thread each."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "seeds", "control_seeds", "workers")
        require_at_least(self, 0, "gradient_ratio", "baseline_extra", "first_seed")
        known = set(ARMS)
        for name in (*self.arms, *self.controls):
            if name.rpartition(":")[2] not in known or name.rpartition(":")[0] not in ("", "random"):
                raise ValueError(f"there is no arm {name!r}; arms are {sorted(known)}, and random:ARM")
        if BASELINE not in self.arms:
            raise ValueError(f"--arms must hold {BASELINE}, which all others are compared with")


@dataclass(frozen=True)
class Task:
    """One run to make."""

    arm: str
    seed: int
    samples: int


def tasks(config: SweepConfig) -> list[Task]:
    """All runs, one seed after another, so that what is finished early is balanced."""
    found = []
    for seed in range(max(config.seeds, config.control_seeds)):
        wanted = [*config.arms * (seed < config.seeds), *config.controls * (seed < config.control_seeds)]
        for arm in dict.fromkeys(wanted):
            extra = config.baseline_extra if arm == BASELINE else 0.0
            samples = round(config.runs.samples * (1 + extra)) // config.runs.batch * config.runs.batch
            found.append(Task(arm, config.first_seed + seed, samples))
    return found


def sweep(config: SweepConfig) -> list[Artifact]:
    """Make the runs that are not there; returns all.

    Raises:
        ArtifactMismatch: ``out`` holds another experiment.
    """
    _same(config)
    with progress.stage("calibration"):
        weights = _spread(config, [("calibrate", name) for name in _calibrated(config)])
    objectives = dict(zip(_calibrated(config), (ObjectiveConfig(**found) for found in weights), strict=True))
    described = {"settings": identity(config), "objectives": {k: to_dict(v) for k, v in objectives.items()}}
    filesystem, root = artifacts.locate(config.out)
    filesystem.makedirs(root, exist_ok=True)
    filesystem.pipe_file(f"{root}/experiment.json", (json.dumps(described, indent=2, sort_keys=True) + "\n").encode())
    with progress.stage("runs"):
        work = []
        for task in tasks(config):
            objective = objectives.get(LIKE.get(task.arm, task.arm), config.runs.objective)
            work.append(("run", task, objective))
        urls = _spread(config, work)
    return [artifacts.open_artifact(url, KIND) for url in urls]


def read_runs(out: str) -> list[dict[str, Any]]:
    """The results of all finished runs of an experiment.

    Raises:
        ArtifactMismatch: two runs were made from other corpora or parts, or two of a seed did not see the same data.
    """
    places = [artifacts.join(folder, "done") for folder in artifacts.folders(artifacts.join(out, "runs"))]
    made = [artifacts.open_artifact(place, KIND) for place in places if artifacts.exists(place)]
    for one in made:
        if one.inputs != made[0].inputs:
            raise ArtifactMismatch(f"{one.url} and {made[0].url} were made from other data: run both anew on the same")
    found = [one.read_json("result.json") for one in made]
    check_same_data(found)
    return found


def check_same_data(runs: Sequence[dict[str, Any]]) -> None:
    """Refuse runs of one seed whose batches differ, at any count of samples that both measured.

    Raises:
        ArtifactMismatch: naming both runs.
    """
    seen: dict[tuple[int, str], tuple[str, str]] = {}
    for one in runs:
        for stop, fingerprint in one["fingerprints"].items():
            name, other = seen.setdefault((one["seed"], stop), (one["arm"], fingerprint))
            if other != fingerprint:
                raise ArtifactMismatch(
                    f"{one['arm']} and {name} of seed {one['seed']} did not see the same data in their first {stop} "
                    f"samples (fingerprints {fingerprint} and {other}): they cannot be compared; run both anew"
                )


def _calibrated(config: SweepConfig) -> list[str]:
    if not config.gradient_ratio:
        return []
    wanted = {LIKE.get(arm, arm) for arm in (*config.arms, *config.controls)}
    return [arm for arm in CALIBRATED if arm in wanted]


def _spread(config: SweepConfig, work: Sequence[tuple[Any, ...]]) -> list[Any]:
    """The results of the pieces of work, in their order, made by so many processes."""
    if config.workers == 1:
        return [_do(config, *piece) for piece in progress.track(work, "runs")]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        config.workers, mp_context=context, initializer=_one_thread, initargs=(os.getpid(),)
    ) as pool:
        waiting = [pool.submit(_do, config, *piece) for piece in work]
        try:
            return [future.result() for future in progress.track(waiting, "runs")]
        except BaseException:
            pool.shutdown(cancel_futures=True)  # what has not begun; what runs is finished, to be found next time
            raise


def _one_thread(parent: int) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    if sys.platform == "linux":  # end with the sweep, however it ends: two writers of one run must not be
        set_death_signal = 1
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before it could be watched
            os._exit(1)


@lru_cache(maxsize=1)
def _experiment(corpus: str, made: str, settings: RunConfig) -> Experiment:
    """Opened once a process."""
    opened = artifacts.open_artifact(corpus, vqa.KIND)
    encoded = artifacts.open_artifact(made, parts.KIND)
    train, test = (parts.read_encoded(encoded, opened, split) for split in ("train", "test"))
    return Experiment(settings, opened, encoded, train, test)


def _do(config: SweepConfig, what: str, *piece: Any) -> Any:
    experiment = _experiment(config.corpus, config.parts, config.runs)
    if what == "calibrate":
        (arm,) = piece
        # A seed that no run has.
        out = artifacts.join(config.out, "calibration", _folder(arm))
        samples = config.calibration_samples // config.runs.batch * config.runs.batch
        return to_dict(calibrated(experiment, arm, config.gradient_ratio, 1_000_003, out, samples))
    task, objective = piece
    out = artifacts.join(config.out, "runs", f"{_folder(task.arm)}-{task.seed}")
    return run(experiment, task.arm, task.seed, objective, out, task.samples).url


def _folder(arm: str) -> str:
    return arm.replace(":", "-")


def _same(config: SweepConfig) -> None:
    filesystem, root = artifacts.locate(config.out)
    if filesystem.exists(file := f"{root}/experiment.json"):
        before = json.loads(filesystem.cat_file(file))["settings"]
        now = json.loads(json.dumps(identity(config)))
        if different := sorted(key for key in now.keys() | before.keys() if now.get(key) != before.get(key)):
            raise ArtifactMismatch(
                f"{config.out} holds an experiment with other settings ({', '.join(different)}): give another --out, "
                "or the settings in its experiment.json"
            )
