"""Stop, with names, before a broken number reaches the weights."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

SPIKE_WINDOW = 64  # accepted losses that a new one is compared with
SPIKE_LEAST = 16  # fewer than these say nothing yet
SPIKE_PATIENCE = 3  # updates skipped in a row before the run stops


class TrainingStopped(Exception):
    """A guard ended the run. The weights on disk are those of the last checkpoint before the failure."""


class NonFinite(TrainingStopped):
    """The loss or a gradient is NaN or infinite; the message names samples and groups."""


class LossSpike(TrainingStopped):
    """The loss left its usual range for several updates in a row."""


class Preempted(Exception):
    """SIGTERM ended the run after a step, and a checkpoint of that step is there. Not a failure: start it again."""


@dataclass
class SpikeGuard:
    """Rejects a loss more than ``sigmas`` robust deviations above the median of the last accepted ones.

    ``sigmas`` None accepts everything. ``losses`` and ``rejected`` are the state, kept in checkpoints.
    """

    sigmas: float | None
    losses: list[float] = field(default_factory=list)
    rejected: int = 0

    def accepts(self, loss: float, step: int, samples: Callable[[], Sequence[str]] = tuple) -> bool:
        """Whether to apply the update of this loss.

        Args:
            samples: gives the ids of what the loss is of, for the message.

        Raises:
            LossSpike: several in a row were rejected.
        """
        if self.sigmas is None:
            return True
        if len(self.losses) >= SPIKE_LEAST:
            median = statistics.median(self.losses)
            # 1.4826 · the median absolute deviation estimates a standard deviation; the floor is for constant losses.
            deviation = 1.4826 * statistics.median(abs(value - median) for value in self.losses)
            limit = median + self.sigmas * max(deviation, 1e-3 * abs(median))
            if loss > limit:
                self.rejected += 1
                if self.rejected >= SPIKE_PATIENCE:
                    raise LossSpike(
                        f"step {step}: loss {loss:.4g} is above {limit:.4g}, like {self.rejected - 1} before it "
                        f"(median of the last {len(self.losses)} others: {median:.4g}); samples: "
                        f"{_shown(samples())}. Look at these "
                        "samples; start again with a larger --spike-sigmas, or anew with a lower rate; the last "
                        "checkpoint is from before"
                    )
                return False
        self.rejected = 0
        self.losses = [*self.losses, loss][-SPIKE_WINDOW:]
        return True


def non_finite(
    step: int, loss: float, norms: Mapping[str, float], samples: Sequence[str], groups: Sequence[str]
) -> NonFinite:
    """The error of a step whose loss, or whose gradient norm of a group, is not finite.

    Args:
        samples: ids of the samples that may be the cause; ``groups``: the groups that they belong to.
    """
    what = f"the loss is {loss}"
    if math.isfinite(loss):
        groups = sorted(name for name, norm in norms.items() if not math.isfinite(norm))
        what = "a gradient is not finite, though the loss is"
    return NonFinite(
        f"step {step}: {what}; samples: {_shown(samples)}; groups: {', '.join(groups)}. Nothing was saved after "
        "the last checkpoint. Look at these samples, lower the learning rate, or train with --precision fp32"
    )


def _shown(samples: Sequence[str]) -> str:
    return ", ".join(samples[:20]) + (f" and {len(samples) - 20} more" if len(samples) > 20 else "")
