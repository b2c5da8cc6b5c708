"""What a run leaves to read: one JSON line per step, TensorBoard, a progress bar with time left."""

import json
import os
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from palate import artifacts, progress

LOG = "training.jsonl"
CORRUPT = "corrupt.jsonl"  # the samples that could not be read, each with its reason
BOARD = "tensorboard"


class RunLog:
    """Writes the logs of one run; only rank 0 has one.

    A run that starts again drops the lines after its checkpoint, so that each step is there once. On a local disk lines
    appear as they are written; for a URL they are kept in a temporary folder and uploaded by ``publish``.

    Args:
        start: steps that an earlier start has done.
        peak_flops: FLOPs a second that the devices of all ranks can do.
    """

    def __init__(
        self, url: str, steps: int, start: int, label: str, tensorboard: bool, peak_flops: float | None = None
    ) -> None:
        self._stack = ExitStack()
        self._steps, self._peak_flops = steps, peak_flops
        self._filesystem, self._root = artifacts.locate(url)
        self._remote = not artifacts.is_local(self._filesystem)
        self.folder = Path(
            self._stack.enter_context(tempfile.TemporaryDirectory(prefix="palate-log-")) if self._remote else self._root
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in (LOG, CORRUPT):
            self._keep_until(name, start)
        self._lines = self._stack.enter_context((self.folder / LOG).open("a"))
        self._bar = self._stack.enter_context(progress.meter(label, total=steps, unit="step"))
        self._board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # a second to import: only where it is wanted

            self._board = SummaryWriter(str(self.folder / BOARD), purge_step=start + 1)
            self._stack.callback(self._board.close)
        self._clock = time.perf_counter()
        self._warm: tuple[int, float] | None = None  # the first step of this start, and when it was over
        self._start_bar(start)

    def step(self, row: dict[str, Any], totals: Mapping[str, float], flops: float | None = None) -> None:
        """Write one step's row, with the time since the last and the rates of what it had: ``totals`` and ``flops``.

        The first step of a start compiles and fills caches: what is said of the time left, here and on the bar, does
        not count it.
        """
        now = time.perf_counter()
        row["seconds"] = round(now - self._clock, 6)
        self._clock = now
        for name in ("samples", "tokens"):
            if name in totals:
                row[f"{name}_per_second"] = round(totals[name] / max(row["seconds"], 1e-9), 1)
        if flops is not None:
            row["flops_per_second"] = flops / max(row["seconds"], 1e-9)
            if self._peak_flops is not None:
                row["mfu"] = row["flops_per_second"] / self._peak_flops
        shown = {"loss": f"{row['loss']:.4g}"}
        if self._warm:
            first, then = self._warm
            row["seconds_left"] = round((now - then) / (row["step"] - first) * (self._steps - row["step"]), 1)
            shown |= {"mfu": f"{row['mfu']:.1%}"} if "mfu" in row else {}
        self._lines.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._lines.flush()
        if self._board is not None:
            for name, value in _scalars(row):
                self._board.add_scalar(name, value, row["step"])
        self._bar.set_postfix(shown, refresh=False)
        if self._warm:
            self._bar.update()
        else:
            self._warm = row["step"], now
            self._start_bar(row["step"])

    def corrupt(self, step: int, samples: list[dict[str, str]]) -> None:
        """Ledger the samples of a step that could not be read."""
        with (self.folder / CORRUPT).open("a") as stream:
            stream.writelines(json.dumps({"step": step, **sample}, ensure_ascii=False) + "\n" for sample in samples)

    def publish(self) -> None:
        """Make what was logged so far as durable as a checkpoint."""
        self._lines.flush()
        os.fsync(self._lines.fileno())
        if self._board is not None:
            self._board.flush()
        if self._remote:
            for file in self.folder.rglob("*"):
                if file.is_file():
                    self._filesystem.put_file(str(file), f"{self._root}/{file.relative_to(self.folder).as_posix()}")

    def close(self) -> None:
        self._stack.close()

    def _start_bar(self, done: int) -> None:
        """Let the bar's rate, and so its time left, begin now, with so many steps done."""
        self._bar.n = self._bar.initial = self._bar.last_print_n = done
        self._bar.start_t = self._bar.last_print_t = time.time()

    def _keep_until(self, name: str, start: int) -> None:
        """Cut a log to the first ``start`` steps; a last line that was cut off goes too."""
        file = self.folder / name
        if self._remote and self._filesystem.exists(f"{self._root}/{name}"):
            self._filesystem.get_file(f"{self._root}/{name}", str(file))
        if not file.exists():
            return
        kept = []
        for line in file.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= start:
                    kept.append(line + "\n")
            except json.JSONDecodeError:
                break
        cut = file.with_name(f".{name}")
        cut.write_text("".join(kept))
        cut.replace(file)  # at once, so that a kill here loses no line


def read(url: str | Path) -> list[dict[str, Any]]:
    """The rows of a run's log, one per step."""
    filesystem, root = artifacts.locate(url)
    return [json.loads(line) for line in filesystem.cat_file(f"{root}/{LOG}").decode().splitlines()]


def _scalars(row: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found = []
    for name, value in row.items():
        if isinstance(value, Mapping):
            found += _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name != "step":
            found.append((prefix + name, float(value)))
    return found
