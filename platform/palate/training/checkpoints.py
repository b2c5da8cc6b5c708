"""Exact checkpoints: safetensors per rank, a JSON index, and the manifest last.

``FOLDER/checkpoints/step-00000100/`` is an artifact: ``rank-00000.safetensors`` … hold each rank's rows of every
trained parameter and of AdamW's moments, and its random states as uint8; ``index.json`` says which file holds which
rows, so a run may start again on another number of ranks, sharded or not. A rank that is killed while writing leaves
a folder without a manifest, which the next run passes over. All ranks must see the same folder.

Training goes on while a checkpoint is written. It holds copies, so later updates do not reach it. Ranks agree on how
far it is in what the train loop's steps exchange anyway, so the threads that write wait for nobody.
"""

import json
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from palate import artifacts
from palate.training import parallel
from palate.training.parallel import World

KIND = "checkpoint"
MOMENTS = ("exp_avg", "exp_avg_sq")
Named = Sequence[tuple[str, nn.Parameter]]

log = logging.getLogger(__name__)


class SaveFailed(Exception):
    """Another rank could not write its part of a checkpoint; on that rank the error itself is raised."""


@dataclass
class _Saving:
    """A checkpoint on its way. First every rank writes its file (``writing``), then rank 0 finishes it (``finishing``).

    ``job`` is what this rank does of the stage in its thread, None if that is nothing.
    """

    step: int
    stage: Literal["writing", "finishing"]
    job: futures.Future[None] | None
    finish: Callable[[], None]


@dataclass
class Store:
    """The checkpoints of one run. ``identity`` is what may not change when it starts again; the last ``keep`` stay.

    With ``background``, ``save`` returns when this rank's copy is made, and a thread writes it. Then the ranks must
    hand what ``status`` returns to ``advance`` now and then, and ``wait`` at the end. One checkpoint at most is on its
    way: the next ``save`` waits for it.
    """

    url: str
    identity: Mapping[str, Any]
    keep: int
    world: World
    background: bool = False
    _saving: _Saving | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self._thread = futures.ThreadPoolExecutor(1, "checkpoint")  # starts when there is something to do

    def save(self, step: int, named: Named, optimizer: torch.optim.Optimizer, counters: Mapping[str, Any]) -> None:
        """Save the state after ``step`` updates, as it is now; every rank calls it.

        Raises:
            SaveFailed, or what writing raised on this rank: of this checkpoint, or of the one before.
        """
        self.wait()
        url, counters = self._place(step), json.loads(json.dumps(counters))
        writing: AbstractContextManager[artifacts.Writer | None] | None = None
        writer = None
        if self.world.main:
            self._remove(step)  # there can only be a half-written or broken one, which this run passed over
            writing = artifacts.writing(url, kind=KIND, config=self.identity)
            writer = writing.__enter__()  # left by _finish; dropped without it, the checkpoint stays unfinished
        tensors, pieces = _local_state(named, optimizer, self.world)
        name = _file_name(self.world.rank)
        gathered = self.world.gather([{**piece, "file": name} for piece in pieces])  # and the folder is clean now
        index = {
            "step": step,
            "world_size": self.world.size,
            "counters": counters,
            "pieces": [piece for rank in gathered for piece in rank],
        }

        def write() -> None:
            _write(tensors, name, url, writer)

        def finish() -> None:
            assert writing is not None  # this is rank 0
            assert writer is not None  # and there was nothing to reuse
            self._finish(step, index, writing, writer)

        def write_and_finish() -> None:
            write()
            finish()

        if self.world.size == 1:
            self._saving = _Saving(step, "finishing", self._thread.submit(write_and_finish), finish)
        else:
            self._saving = _Saving(step, "writing", self._thread.submit(write), finish)
        if not self.background:
            self.wait()

    def status(self) -> list[Any]:
        """What the other ranks must know of this rank's part of the checkpoint on its way: [done, error], JSON."""
        job = self._saving.job if self._saving else None
        if job is None:
            return [True, None]
        if not job.done():
            return [False, None]
        error = job.exception()
        return [True, None if error is None else f"{type(error).__name__}: {error}"]

    def advance(self, statuses: Sequence[Sequence[Any]]) -> None:
        """Go on with the checkpoint on its way as far as the ``status`` of every rank allows; every rank calls it.

        Raises:
            SaveFailed, or what writing raised on this rank; on every rank, so that none waits for the others.
        """
        saving = self._saving
        if saving is None:
            return
        failed = [(rank, error) for rank, (_, error) in enumerate(statuses) if error is not None]
        if failed:
            self._saving = None
            own = saving.job.exception() if saving.job and saving.job.done() else None
            if own is not None:
                own.add_note(f"while the checkpoint of step {saving.step} was written to {self._place(saving.step)}")
                raise own
            rank, error = failed[0]
            raise SaveFailed(f"rank {rank} could not write its part of {self._place(saving.step)}: {error}")
        if not all(done for done, _ in statuses):
            return
        if saving.stage == "finishing":
            self._saving = None
        else:
            saving.stage = "finishing"
            saving.job = self._thread.submit(saving.finish) if self.world.main else None

    def wait(self) -> None:
        """Return when no checkpoint is on its way any more; every rank calls it. Raises what ``advance`` raises."""
        while self._saving is not None:
            if self._saving.job is not None:
                futures.wait([self._saving.job])
            self.advance(self.world.gather(self.status()))

    def close(self) -> None:
        """Let this rank's thread end what it is doing; waits for no other rank."""
        self._thread.shutdown()
        if self._saving is not None and (error := self.status()[1]):
            log.error("the checkpoint of step %d was not written: %s", self._saving.step, error)
        self._saving = None

    def _finish(
        self,
        step: int,
        index: Mapping[str, Any],
        writing: AbstractContextManager[artifacts.Writer | None],
        writer: artifacts.Writer,
    ) -> None:
        """Write the index and the manifest of a checkpoint whose ranks have written their files; rank 0's part."""
        try:
            self._require_all_ranks(step)
            writer.write_json("index.json", index)
        except BaseException as error:
            writing.__exit__(type(error), error, error.__traceback__)
            raise
        writing.__exit__(None, None, None)
        steps = self._steps()
        kept = [other for other in steps if other <= step and self._is_there(other)][-self.keep :]
        for other in set(steps) - set(kept):  # older ones, and those that were not finished or passed over as broken
            self._remove(other)

    def load(self, named: Named, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
        """Restore the newest whole checkpoint: weights, moments and random states. Returns its index.

        None if there is none yet. Broken ones are passed over with a warning. Random states come back only at the
        number of ranks that saved them.

        Raises:
            ArtifactMismatch: the checkpoint is of another run; the message names the field that differs.
            ArtifactCorrupt: there are checkpoints, and none is whole.
        """
        outcome: dict[str, Any] = {}
        if self.world.main:
            try:
                outcome["step"] = self._newest()
            except artifacts.ArtifactError as error:
                outcome["error"] = [type(error).__name__, str(error)]
        outcome = self.world.broadcast(outcome)
        if "error" in outcome:  # on every rank, so that none waits for the others
            raise getattr(artifacts, outcome["error"][0])(outcome["error"][1])
        if outcome["step"] is None:
            return None
        checkpoint = artifacts.open_artifact(self._place(outcome["step"]), KIND)
        index = checkpoint.read_json("index.json")
        read = _Reader(checkpoint, index["pieces"])
        for name, parameter in named:
            with torch.no_grad():
                parallel.local(parameter).copy_(read(f"model.{name}", parameter))
            if f"optimizer.{name}.step" in read:
                state = {key: read(f"optimizer.{name}.{key}", parameter) for key in MOMENTS}
                state = {key: parallel.like(parameter, value) for key, value in state.items()}
                optimizer.state[parameter] = {"step": read.scalar(f"optimizer.{name}.step", parameter.device), **state}
        if index["world_size"] == self.world.size:
            with safe_open(checkpoint.local(_file_name(self.world.rank)), "pt") as file:
                set_random_state({key: file.get_tensor(key) for key in file.keys() if key.startswith("random.")})  # noqa: SIM118
        return index

    def discard(self) -> None:
        """Remove every checkpoint, for a fresh start; every rank calls it."""
        if self.world.main:
            for step in self._steps():
                self._remove(step)
        self.world.barrier()

    def _newest(self) -> int | None:
        broken = False
        for step in reversed(self._steps()):
            try:
                artifacts.open_artifact(self._place(step), KIND).verify()
            except artifacts.ArtifactMissing:
                log.warning("checkpoint %s was not finished; going back to the one before", self._place(step))
                continue
            except artifacts.ArtifactCorrupt as error:
                log.warning("checkpoint %s is broken; going back to the one before: %s", self._place(step), error)
                broken = True
                continue
            with artifacts.writing(self._place(step), kind=KIND, config=self.identity):
                pass  # it is finished, so this only compares the identities
            return step
        if broken:
            raise artifacts.ArtifactCorrupt(
                f"every checkpoint under {self.url} is broken: restore the storage, or pass --fresh to start anew"
            )
        return None

    def _require_all_ranks(self, step: int) -> None:
        """Whether the files of the other ranks are where rank 0 looks for them."""
        filesystem, root = artifacts.locate(self._place(step))
        present = {path.rpartition("/")[2] for path in filesystem.ls(root, detail=False)}
        found = {_file_name(rank) for rank in range(1, self.world.size)} & present
        if len(found) < self.world.size - 1:
            raise artifacts.ArtifactMissing(
                f"{self._place(step)} holds the files of {len(found) + 1} ranks of {self.world.size}: the run folder "
                "must be storage that all ranks share (a shared file system or an object store's URL)"
            )

    def _is_there(self, step: int) -> bool:
        try:
            artifacts.open_artifact(self._place(step), KIND)
        except artifacts.ArtifactError:
            return False
        return True

    def _remove(self, step: int) -> None:
        """Remove a checkpoint, the manifest first: the rest is then an unfinished one to every reader."""
        filesystem, root = artifacts.locate(self._place(step))
        if filesystem.exists(f"{root}/{artifacts.MANIFEST}"):
            filesystem.rm_file(f"{root}/{artifacts.MANIFEST}")
        if filesystem.exists(root):
            filesystem.rm(root, recursive=True)

    def _place(self, step: int) -> str:
        return artifacts.join(self.url, "checkpoints", f"step-{step:08d}")

    def _steps(self) -> list[int]:
        """The steps that have a folder, finished or not, ascending."""
        filesystem, root = artifacts.locate(artifacts.join(self.url, "checkpoints"))
        if not filesystem.exists(root):
            return []
        names = (path.rstrip("/").rpartition("/")[2] for path in filesystem.ls(root, detail=False))
        return sorted(int(name.removeprefix("step-")) for name in names if name.startswith("step-"))


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The states of torch's, numpy's and Python's global generators, as uint8 tensors."""
    states = {"random.torch": torch.get_rng_state()}
    if device.type == "cuda":
        states["random.cuda"] = torch.cuda.get_rng_state(device)
    numpy_state: dict[str, Any] = np.random.get_state(legacy=False)
    numpy_state = {
        **numpy_state,
        "state": {"key": numpy_state["state"]["key"].tolist(), "pos": numpy_state["state"]["pos"]},
    }
    content = json.dumps({"numpy": numpy_state, "python": random.getstate()}).encode()
    states["random.json"] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    return states


def set_random_state(states: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(states["random.torch"])
    if "random.cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["random.cuda"])
    others = json.loads(states["random.json"].numpy().tobytes())
    others["numpy"]["state"]["key"] = np.array(others["numpy"]["state"]["key"], dtype=np.uint32)
    np.random.set_state(others["numpy"])
    version, internal, gauss = others["python"]
    random.setstate((version, tuple(internal), gauss))


def _file_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def _local_state(
    named: Named, optimizer: torch.optim.Optimizer, world: World
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Copies of what this rank saves, in CPU memory, and which rows of what they are.

    Rank 0 saves what all ranks hold alike.
    """
    tensors, pieces = {}, []

    def add(name: str, tensor: Tensor, first: int, rows: int) -> None:
        tensors[name] = tensor.detach().to("cpu", copy=True).contiguous()
        pieces.append({"name": name, "first": first, "rows": rows})

    for name, parameter in named:
        sharded = parallel.is_sharded(parameter)
        first, rows = parallel.local_rows(parameter)
        state = optimizer.state.get(parameter, {})
        if (world.main or sharded) and rows:
            add(f"model.{name}", parallel.local(parameter), first, rows)
            for key in MOMENTS:
                if key in state:
                    add(f"optimizer.{name}.{key}", parallel.local(state[key]), first, rows)
        if world.main and state:
            add(f"optimizer.{name}.step", state["step"], 0, 1)
    tensors.update(random_state(world.device))
    return tensors, pieces


def _write(tensors: dict[str, Tensor], name: str, url: str, writer: artifacts.Writer | None) -> None:
    """Write a rank's file: rank 0 through its writer, the others straight to the checkpoint's place."""
    filesystem, root = artifacts.locate(url)
    with artifacts.os_errors():
        if writer is not None:
            save_file(tensors, writer.folder / name)
        elif artifacts.is_local(filesystem):
            save_file(tensors, Path(root) / name)
        else:
            with TemporaryDirectory(prefix="palate-") as temporary:
                save_file(tensors, Path(temporary) / name)
                filesystem.put_file(str(Path(temporary) / name), f"{root}/{name}")


class _Reader:
    """Reads the rows that a rank needs from whichever files hold them."""

    def __init__(self, checkpoint: artifacts.Artifact, pieces: Sequence[Mapping[str, Any]]) -> None:
        self.checkpoint = checkpoint
        self.files: dict[str, Any] = {}
        self.pieces: dict[str, list[Mapping[str, Any]]] = {}
        for piece in pieces:
            self.pieces.setdefault(piece["name"], []).append(piece)

    def __contains__(self, name: str) -> bool:
        return name in self.pieces

    def __call__(self, name: str, parameter: Tensor) -> Tensor:
        """This rank's rows of a tensor that is shaped and divided as ``parameter`` is."""
        first, rows = parallel.local_rows(parameter)
        if not parameter.dim():
            return self.scalar(name, parameter.device)
        found = torch.empty_like(parallel.local(parameter))
        for piece in self.pieces[name]:
            start, end = max(first, piece["first"]), min(first + rows, piece["first"] + piece["rows"])
            if start < end:
                part = self._open(piece["file"]).get_slice(name)[start - piece["first"] : end - piece["first"]]
                found[start - first : end - first] = part.to(found.device)
        return found

    def scalar(self, name: str, device: torch.device) -> Tensor:
        (piece,) = self.pieces[name]
        return self._open(piece["file"]).get_tensor(name).to(device)

    def _open(self, path: str) -> Any:
        if path not in self.files:
            self.files[path] = safe_open(self.checkpoint.local(path), "pt")
        return self.files[path]
