"""List gradient caching: the gradient of a loss over a list at the memory of one image.

A list loss couples m images only through their m errors, so its gradient is ``sum_k w_k * grad e_k`` with w = dL/de,
and w needs the errors' values alone. Three ways to the same gradient, with one signature:

    plain_loss      one graph over all images: fastest for full weights, memory grows with the list
    two_pass_loss   errors without a graph, then each chunk forward again and backward with its weight: the memory of
                    one chunk, one more forward pass
    one_pass_loss   each image forward and backward once, its gradient kept until the weights are known: the memory of
                    one image and of m gradients, which is little for an adapter

The chunks of images and ``errors_of(chunk)`` are the caller's. ``errors_of`` returns the errors (n,) of the chunk's n
images, or these and further tensors with n rows, such as residuals or timesteps, which carry no gradient.
``objective(errors_N, *further)`` gives the scalar loss of all of them, in the order of the chunks. Draw noise and
timesteps before and put them into the chunk: only the global random state, which dropout uses, is replayed.

All return a loss to call ``backward`` on as usual, scaled or summed with others if wanted; under ``no_grad`` they only
compute its value.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from palate.lpo.objectives import safeguard_scale
from palate.training.parallel import is_sharded

Chunk = TypeVar("Chunk")
ErrorsOf = Callable[[Chunk], Tensor | tuple[Tensor, ...]]
Objective = Callable[..., Tensor]

# How far, relatively, an error may be from itself when computed again. A GPU's sums differ in their last digits.
REPLAY_TOLERANCE = 1e-4
REPLAY_TOLERANCE_AUTOCAST = 1e-2


@dataclass(frozen=True)
class ListLoss:
    """``loss``: a scalar with a gradient; ``errors_N`` and ``weights_N`` = dloss/derrors: numbers, to look at."""

    loss: Tensor
    errors_N: Tensor
    weights_N: Tensor


def plain_loss(model: nn.Module, chunks: Sequence[Chunk], errors_of: ErrorsOf[Chunk], objective: Objective) -> ListLoss:
    """The loss by one graph over all chunks. Peak memory is that of all images.

    Raises:
        ValueError: there is no chunk, or the errors are not as described above.
    """
    parts = [_parts(errors_of(chunk)) for chunk in _some(chunks)]
    loss, weights_N = _weighted(objective, parts)
    errors_N = torch.cat([part[0] for part in parts])
    if torch.is_grad_enabled():
        loss = loss + (weights_N * (errors_N - errors_N.detach())).sum()
    return ListLoss(loss, errors_N.detach(), weights_N)


def two_pass_loss(
    model: nn.Module, chunks: Sequence[Chunk], errors_of: ErrorsOf[Chunk], objective: Objective
) -> ListLoss:
    """The loss by two passes. Peak memory is that of one chunk.

    The first pass is made here, without a graph; the second in ``backward``, chunk by chunk, with the random state and
    autocast of the first, adding to ``.grad`` of the parameters (so ``torch.autograd.grad`` finds nothing: use
    ``backward``). Under FSDP2 every chunk is a collective: all ranks must have as many.

    Raises:
        ValueError: as ``plain_loss``; or the model has batch statistics, or no parameter to train.
        RuntimeError: in ``backward``, when the second pass finds other errors than the first.
    """
    refuse_batch_statistics(model)
    _trainable(model)
    replay = _Replay(_device(model))
    states, parts = [], []
    with torch.no_grad():
        for chunk in _some(chunks):
            states.append(replay.state())
            parts.append(_parts(errors_of(chunk)))
    loss, weights_N = _weighted(objective, parts)
    scored = [part[0] for part in parts]
    errors_N = torch.cat(scored)
    if torch.is_grad_enabled():

        def backward(gradient: Tensor) -> None:
            weights = (weights_N * gradient).split([len(errors) for errors in scored])
            differences = []
            with replay.scope():
                for chunk, state, before, weight in zip(chunks, states, scored, weights, strict=True):
                    replay.restore(state)
                    with replay.forward():
                        errors = _parts(errors_of(chunk))[0]
                    differences.append(((errors.detach() - before).abs() / before.abs().clamp(min=1e-12)).amax())
                    if errors.requires_grad:  # not where nothing that is trained was used, as for nobody's images
                        torch.autograd.backward(errors, weight)
            replay.check(torch.stack(differences))

        anchor = torch.zeros((), device=loss.device, requires_grad=True)
        loss = _Deferred.apply(anchor, loss, backward)
    return ListLoss(loss, errors_N, weights_N)


def one_pass_loss(
    model: nn.Module,
    chunks: Sequence[Chunk],
    errors_of: ErrorsOf[Chunk],
    objective: Objective,
    *,
    safeguard_mu: float | None = None,
) -> ListLoss:
    """The loss by one pass, for models that train few parameters (LoRA), one image a chunk.

    The backward passes are made here. Memory is that of one image and, for m images, m gradients in float32: call it
    once for each list.

    Args:
        safeguard_mu: apply ``safeguard_scale`` to the list with the inner products of the parameters' gradients, which
            are at hand here, so that its promise holds for the parameters themselves. ``weights_N`` are those after it.

    Raises:
        ValueError: as ``two_pass_loss``; or a chunk has several images, or the parameters are sharded.
    """
    refuse_batch_statistics(model)
    parameters = _trainable(model)
    if any(is_sharded(parameter) for parameter in parameters):
        raise ValueError(
            "the one-pass form keeps whole gradients of the trained parameters, but these are sharded (FSDP2): use the "
            "two-pass form, or do not shard the adapter"
        )
    wanted, gradients_NP = torch.is_grad_enabled(), None
    parts = []
    for index, chunk in enumerate(_some(chunks)):
        errors, *further = _parts(errors_of(chunk))
        if len(errors) != 1:
            raise ValueError(f"the one-pass form takes one image a chunk, but chunk {index} has {len(errors)}")
        parts.append((errors.detach(), *further))
        if wanted:
            found = torch.autograd.grad(errors.sum(), parameters, allow_unused=True, materialize_grads=True)
            if gradients_NP is None:
                size = sum(parameter.numel() for parameter in parameters)
                gradients_NP = errors.new_empty(len(chunks), size)
            torch.cat([part.flatten().to(errors.dtype) for part in found], out=gradients_NP[index])
    loss, weights_N = _weighted(objective, parts)
    if gradients_NP is not None:
        with torch.no_grad(), torch.autocast(loss.device.type, enabled=False):
            if safeguard_mu is not None:
                gram = (gradients_NP @ gradients_NP.mT)[None]
                weights_N = weights_N * safeguard_scale(weights_N[None], gram, safeguard_mu)[0]
            gradient_P = weights_N @ gradients_NP
        loss = _Known.apply(loss, gradient_P, *parameters)
    return ListLoss(loss, torch.cat([part[0] for part in parts]), weights_N)


def refuse_batch_statistics(model: nn.Module) -> None:
    """Do nothing if images can be taken one at a time.

    Raises:
        ValueError: a layer computes statistics over the batch, naming it: an image's error then depends on the images
            beside it, and no pass over images apart gives the gradient of all together.
    """
    for name, module in model.named_modules():
        over_batch = isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)
        tracked = isinstance(module, _NormBase) and module.training and module.running_mean is not None
        if over_batch or tracked:
            raise ValueError(
                f"{type(module).__name__} {name!r} is in training mode and uses or gathers statistics of the batch, so "
                "images cannot be taken one at a time: put it in eval mode, or compute the list without caching"
            )


class _Deferred(torch.autograd.Function):
    """A number whose ``backward`` calls a function with the gradient that reaches it."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, value: Tensor, backward: Callable[[Tensor], None]) -> Tensor:
        ctx.backward_pass = backward
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        ctx.backward_pass(gradient)
        return None, None, None


class _Known(torch.autograd.Function):
    """A number whose gradient with respect to the parameters is known, as one vector."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradient_P: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(gradient_P)
        ctx.like = [(parameter.shape, parameter.dtype) for parameter in parameters]
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_P,) = ctx.saved_tensors
        parts = (gradient_P * gradient).split([shape.numel() for shape, _ in ctx.like])
        return None, None, *(p.view(shape).to(dtype) for p, (shape, dtype) in zip(parts, ctx.like, strict=True))


class _Replay:
    """Runs a forward pass again with the random state and the autocast of its first run."""

    def __init__(self, device: torch.device) -> None:
        self.kind = device.type
        self.gpus = [device.index or 0] if device.type == "cuda" else []
        self.autocast = torch.is_autocast_enabled(self.kind), torch.get_autocast_dtype(self.kind)

    def state(self) -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(gpu) for gpu in self.gpus)]

    def restore(self, state: list[Tensor]) -> None:
        torch.set_rng_state(state[0])
        for gpu, gpu_state in zip(self.gpus, state[1:], strict=True):
            torch.cuda.set_rng_state(gpu_state, gpu)

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Leaves the random state as it was."""
        with torch.random.fork_rng(self.gpus):
            yield

    @contextmanager
    def forward(self) -> Iterator[None]:
        enabled, dtype = self.autocast
        with torch.enable_grad(), torch.autocast(self.kind, dtype, enabled=enabled):
            yield

    def check(self, differences: Tensor) -> None:
        """Compare the largest relative differences of the chunks' errors with what a GPU's rounding explains.

        Raises:
            RuntimeError: an error is not what it was the first time.
        """
        tolerance = REPLAY_TOLERANCE_AUTOCAST if self.autocast[0] else REPLAY_TOLERANCE
        # A difference of NaN comes from an error that is not finite, which the train loop's guard reports.
        if (worst := float(differences.max())) > tolerance:
            raise RuntimeError(
                f"the second pass of chunk {int(differences.argmax())} found an error that differs by {worst:.2g} "
                f"(relatively) from the first, over {tolerance:g}: the network or errors_of draws from a generator of "
                "its own, or keeps state between calls. Draw noise and timesteps before, as part of the chunk"
            )


def _weighted(objective: Objective, parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, Tensor]:
    """The loss and its derivative by the errors, both without a graph."""
    errors_N, *further = (torch.cat(column).detach() for column in zip(*parts, strict=True))
    with torch.enable_grad():
        leaf_N = errors_N.requires_grad_()
        loss = objective(leaf_N, *further)
        if loss.shape != ():
            raise ValueError(f"objective must return one number for all images, got shape {tuple(loss.shape)}")
        (weights_N,) = torch.autograd.grad(loss, leaf_N)
    return loss.detach(), weights_N


def _parts(found: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    errors, *further = found if isinstance(found, tuple) else (found,)
    if errors.dim() != 1 or errors.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"errors_of must return the errors of a chunk's images as (n,) in float32, got {tuple(errors.shape)} in "
            f"{errors.dtype}: take the mean square of prediction minus target in float32"
        )
    return errors, *(values.detach() for values in further)


def _some(chunks: Sequence[Chunk]) -> Sequence[Chunk]:
    if not chunks:
        raise ValueError("there is no image to take a loss of: leave empty lists out of the batch")
    return chunks


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError("no parameter of the model requires a gradient: add a LoRA, or unfreeze what is to be trained")
    return parameters


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
