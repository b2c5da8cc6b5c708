"""Preemption: SIGTERM, which torchrun, Kubernetes and Slurm send before they take a machine away."""

import signal
import threading
from types import FrameType, TracebackType


class Notice:
    """Notes a SIGTERM inside ``with``, in ``given``, instead of dying of it; the train loop acts on it between steps.

    Only the main thread can take signals. Elsewhere (a Ray Train worker runs its function in a thread), and where
    SIGTERM is handled outside of Python, nothing is changed and ``given`` stays False. A notice that nobody acted on
    is passed on to the former handler at the end.
    """

    def __init__(self) -> None:
        self.given = False
        self._taken = False

    def __enter__(self) -> "Notice":
        former = signal.getsignal(signal.SIGTERM)
        if threading.current_thread() is threading.main_thread() and former is not None:
            try:
                signal.signal(signal.SIGTERM, self._note)
            except ValueError:  # the main thread of a subinterpreter
                return self
            self._former, self._taken = former, True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._taken:
            return
        signal.signal(signal.SIGTERM, self._former)
        if self.given and kind is None:
            signal.raise_signal(signal.SIGTERM)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # A second SIGTERM, as launchers send (to the process group, and to each process), says nothing new.
        self.given = True
