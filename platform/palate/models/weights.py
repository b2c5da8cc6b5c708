"""What tells the weights of a model apart from another's: a hash of a few values of every tensor."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

_SAMPLES = 8  # of each tensor, its ends among them


def sampled_hash(named: Iterable[tuple[str, Tensor]]) -> str:
    """16 hexadecimal digits of some values of these tensors, in the order of their names.

    Values are rounded to bfloat16 first, so that a model loaded in float32 and in bfloat16 has the same hash. Training
    changes all values of what it trains, so that samples tell.
    """
    samples = []
    for _, weight in sorted(named):
        flat = weight.detach().reshape(-1)
        where = torch.linspace(0, flat.numel() - 1, _SAMPLES, dtype=torch.float64).long()
        samples.append(flat[where.to(flat.device)].to(torch.bfloat16))
    content = torch.cat(samples).cpu().view(torch.int16).numpy().tobytes()
    return hashlib.sha256(content).hexdigest()[:16]
