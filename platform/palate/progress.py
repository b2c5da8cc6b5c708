"""Progress with time left, on whatever takes longer than a glance, and the time that each stage took."""

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0  # in a log

T = TypeVar("T")


def track(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    """Iterate with a progress bar on a terminal, or a line every ten seconds in a log."""
    with meter(label, total if total is not None else _length(items)) as bar:
        for item in items:
            yield item
            bar.update()


@contextmanager
def meter(label: str, total: int | None = None, unit: str = "it") -> Iterator["tqdm[None]"]:
    """A bar to ``update(n)`` and ``set_postfix(loss=…)`` by hand."""
    if sys.stderr.isatty():
        bar = tqdm(total=total, desc=label, unit=unit, mininterval=0.2, dynamic_ncols=True, smoothing=0.1)
    else:
        seconds = SECONDS_BETWEEN_LINES
        bar = tqdm(
            total=total,
            desc=label,
            unit=unit,
            file=_Lines(),
            mininterval=seconds,
            maxinterval=seconds,
            delay=seconds,
            position=0,
            ncols=100,
            ascii=True,
            smoothing=0.1,
        )
    with bar:
        yield bar


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Announce a stage, and say how long it took."""
    print(f"== {name}", flush=True)
    start = time.perf_counter()
    yield
    print(f"== {name}: {time.perf_counter() - start:.1f} s", flush=True)


class _Lines:
    """Standard error as a log: what a terminal would redraw in place becomes a line of its own."""

    def write(self, text: str) -> None:
        if text.strip():
            print(text.strip(), file=sys.stderr)

    def flush(self) -> None:
        sys.stderr.flush()


def _length(items: Iterable[T]) -> int | None:
    return len(items) if isinstance(items, Sized) else None
