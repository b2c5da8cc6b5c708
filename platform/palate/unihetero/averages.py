"""An average of weights over the steps of a run, whose points compare whenever they are taken.

The power function average (Karras et al. 2024, arXiv 2312.02696, section 3.1): after t updates the weights of update
i count in proportion to i^gamma, so the average spans the same share of the run at every t. With a constant rate it
takes the place of a decay at each point of a scaling curve. gamma = 6.94 has a relative width of 0.10.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

WIDTH_10 = 6.94


class Average:
    """The average of named parameters."""

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]], gamma: float) -> None:
        self.gamma = gamma
        self.fast = [parameter for _, parameter in named]
        self.slow = [(name, nn.Parameter(p.detach().clone(), requires_grad=False)) for name, p in named]

    def kept(self) -> list[tuple[str, nn.Parameter]]:
        """What checkpoints must keep."""
        return [(f"average.{name}", parameter) for name, parameter in self.slow]

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Take in the weights after update ``step`` (from 1)."""
        momentum = (1 - 1 / step) ** (self.gamma + 1)
        slow = [parameter.data for _, parameter in self.slow]
        torch._foreach_lerp_(slow, [parameter.data for parameter in self.fast], 1 - momentum)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The average in the model, and afterwards the weights again, bit for bit."""
        before = [parameter.detach().clone() for parameter in self.fast]
        self.put()
        try:
            yield
        finally:
            self._put(before)

    def put(self) -> None:
        """The average in the model, for good."""
        self._put([parameter for _, parameter in self.slow])

    @torch.no_grad()
    def _put(self, values: Sequence[torch.Tensor]) -> None:
        for parameter, value in zip(self.fast, values, strict=True):
            parameter.copy_(value)
