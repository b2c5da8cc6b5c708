"""Ranks and what they exchange, the launchers that need no Ray, sharding and activation checkpointing."""

import functools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Precision = Literal["fp32", "bf16"]
WAIT_SECONDS = 24 * 3600  # that ranks wait for one another: one may encode or write while the others do nothing
Config = TypeVar("Config")
Result = TypeVar("Result")


@dataclass(frozen=True)
class World:
    """The processes that train together. The default is this process alone.

    ``report`` is called by every rank with the same figures at each checkpoint; a launcher may show them somewhere. The
    model is then that of the checkpoint, which may still be on its way to the storage.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    report: Callable[[Mapping[str, float]], None] = lambda figures: None

    @staticmethod
    def current(device: torch.device | None = None) -> "World":
        """The world of the process group that this process has joined, or this process alone.

        ``device`` defaults to the GPU of this rank, or the CPU where there is none.
        """
        rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        if device is None and torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)) % torch.cuda.device_count())
        if device is not None and device.type == "cuda":
            torch.cuda.set_device(device)
        return World(rank, size, device or torch.device("cpu"))

    @property
    def main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.size > 1:
            # A tensor on the CPU travels by gloo, also where the gradients travel by NCCL.
            dist.all_reduce(torch.zeros(1))

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace the tensors, which lie on one device, by their sums over the ranks."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, summed in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(summed.view_as(tensor))

    def gather(self, value: Any) -> list[Any]:
        """Every rank's JSON value, in the order of ranks, on every rank."""
        if self.size == 1:
            return [value]
        content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.long) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(content)]))
        longest = int(max(lengths))
        padded = nn.functional.pad(content, (0, longest - len(content)))
        found = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(found, padded)
        return [json.loads(bytes(f[: int(n)].tolist())) for f, n in zip(found, lengths, strict=True)]

    def broadcast(self, value: Any) -> Any:
        """Rank 0's JSON value, on every rank."""
        return self.gather(value if self.main else None)[0]


def backend(device: str) -> str:
    """What the ranks talk through: tensors on a GPU by NCCL, small things on the CPU by gloo."""
    return "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"


def run_local(worker: Callable[[Config, World], Result], config: Config) -> Result:
    """Run ``worker`` in this process."""
    return worker(config, World.current())


def run_torchrun(
    worker: Callable[[Config, World], Result], config: Config, once: Callable[[Config], None] | None = None
) -> Result:
    """Run ``worker`` as one rank of the group that ``torchrun`` started this process in.

    ``once`` is done by rank 0 before, unless torchrun has started the group again after a fault.

    Raises:
        ValueError: it was not started by torchrun.
    """
    if "RANK" not in os.environ or "MASTER_ADDR" not in os.environ:
        raise ValueError(
            "--launcher torchrun needs torchrun's environment (RANK, WORLD_SIZE, MASTER_ADDR): start the script by "
            "`torchrun --nproc-per-node N script.py …`, or pass --launcher local"
        )
    with process_group():
        world = World.current()
        if once and world.main and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
            once(config)
        world.barrier()
        return worker(config, world)


@contextmanager
def process_group(**keywords: Any) -> Iterator[None]:
    """Join the process group of the environment, or the one that ``keywords`` of ``init_process_group`` describe."""
    keywords = {"timeout": timedelta(seconds=WAIT_SECONDS), **keywords}
    dist.init_process_group(backend("cuda" if torch.cuda.is_available() else "cpu"), **keywords)
    try:
        yield
    finally:
        dist.destroy_process_group()


def shard(model: nn.Module, blocks: Iterable[nn.Module], world: World, precision: Precision = "fp32") -> None:
    """Shard parameters, gradients and optimizer state over the ranks, in place (FSDP2).

    Each block is gathered alone, what is left of the model together. Take the parameter groups from the model after
    this call. Weights stay float32; with ``bf16`` blocks compute in it and gradients are summed in float32.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # a second to import, only wanted here

    mesh = dist.device_mesh.init_device_mesh(world.device.type, (world.size,))
    dtype = torch.bfloat16 if precision == "bf16" else None
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for module in [*blocks, model]:
        wrapped = fully_shard(module, mesh=mesh, mp_policy=policy)
        # The loss is already divided by the totals of the global batch, so gradients are summed, not averaged.
        wrapped.set_gradient_divide_factor(1.0)
        wrapped.set_force_sum_reduction_for_comms(True)


def checkpoint_activations(blocks: Iterable[nn.Module]) -> None:
    """Compute each block's inner activations again in the backward pass instead of keeping them, in place."""
    for block in blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor, told by its mesh: the class itself takes a second to import."""
    return hasattr(tensor, "device_mesh")


def local(tensor: Any) -> Tensor:
    """The part of a tensor that lies on this rank: all of it unless it is sharded."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def local_rows(parameter: Any) -> tuple[int, int]:
    """First row and number of rows of a parameter that lie on this rank (``torch.chunk``'s division, as FSDP2's)."""
    rows = parameter.shape[0] if parameter.dim() else 1
    if not is_sharded(parameter):
        return 0, rows
    if [placement.is_shard(0) for placement in parameter.placements] != [True]:
        raise ValueError(f"only parameters sharded by rows over one mesh can be saved, found {parameter.placements}")
    mesh = parameter.device_mesh
    chunk = -(-rows // mesh.size())
    start = min(mesh.get_local_rank() * chunk, rows)
    return start, min(chunk, rows - start)


def like(parameter: Any, part: Tensor) -> Tensor:
    """This rank's part as a tensor that is sharded as ``parameter`` is."""
    if not is_sharded(parameter):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
