"""The one train loop. A method brings a model, parameter groups, a stream, ``weigh`` and ``loss``; the rest is here.

The loss of a step is ``sum over samples of parts / totals of the global batch``, so gradients are summed over
micro-batches and ranks, and neither changes what is computed. Each group of parameters has its own clipping, schedule
and update counter; a group whose total in the global batch is 0 is left alone: no gradient, no moments, no decay.

On retry: a run that is started again goes on from its last whole checkpoint with the same batches, and at the same
number of ranks with the same bits; a finished run does nothing. SIGTERM saves the step that is under way, and ends the
run after it.
"""

import contextlib
import logging
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from palate.config import identity as identity_fields
from palate.config import scale
from palate.training import guards, parallel
from palate.training.checkpoints import Store
from palate.training.loading import Ahead, Step
from palate.training.logging import RunLog
from palate.training.parallel import Precision, World
from palate.training.preemption import Notice
from palate.training.stream import Cursor, Loaded, Stream, Unit, part

log = logging.getLogger(__name__)

HOPELESS = 8  # samples that could not be read, where none could, end a run


@dataclass(frozen=True)
class LoopConfig:
    """How a run goes; what the methods have in common."""

    steps: int
    """Updates in the whole run, each of one global batch."""
    seed: int = 0
    """Of dropout and whatever else draws from the global generators; the stream has its own."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls after the warm-up: to 0 at the group's last update, or not at all."""
    warmup_ratio: float = 0.0
    """Share of a group's updates over which its learning rate rises linearly."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's."""
    epsilon: float = 1e-8
    """AdamW's."""
    precision: Precision = "fp32"
    """bf16: the forward pass computes in bfloat16 where that is safe; weights and moments stay float32."""
    spike_sigmas: float | None = scale(None)
    """Skip an update whose loss is so many robust deviations above the median of the last 64; None: never. A run that
    the guard stopped may go on with another limit."""
    max_corrupt: int = scale(1000)
    """Stop when more samples than this could not be read; a run may go on with another limit."""
    micro_batch: int = scale(8)
    """Units that a rank takes through the model at once."""
    checkpoint_every: int = scale(100)
    """Steps between checkpoints; there is one at the end in any case."""
    keep: int = scale(2)
    """Checkpoints to keep."""
    background_saves: bool = scale(True)
    """Go on training while a checkpoint is written, at the cost of a copy of what it holds in CPU memory."""
    tensorboard: bool = scale(True)
    """Write TensorBoard's event files beside the JSON lines."""
    label: str = scale("training")
    """What the progress bar is called."""
    read_ahead: int = scale(0)
    """Steps whose samples are loaded while others are computed; 0: each step loads its own first."""
    readers: int = scale(4)
    """Threads that load samples ahead."""

    def __post_init__(self) -> None:
        for name in ("steps", "micro_batch", "checkpoint_every", "keep", "readers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.read_ahead < 0:
            raise ValueError(f"read_ahead must be at least 0, got {self.read_ahead}")


@dataclass(frozen=True)
class Group:
    """Parameters that are clipped, scheduled and counted together.

    ``steps`` is how many updates the group will get in the whole run, for its schedule (see ``updates_per_group``);
    None: one every step.
    """

    name: str
    parameters: Sequence[tuple[str, nn.Parameter]]
    learning_rate: float
    weight_decay: float = 0.0
    clip_norm: float | None = None
    steps: int | None = None


@dataclass(frozen=True)
class LossOutput:
    """``loss``: a scalar, already divided by the totals of the global batch. ``metrics``: name to (sum, weight), each
    reported as the ratio of the sums over the global batch."""

    loss: Tensor
    metrics: Mapping[str, tuple[Tensor | float, Tensor | float]] = field(default_factory=dict)


# What a sample adds to each group's total, by the group's name. Names that are no group's are summed as well: further
# denominators of the loss, or "tokens" for the rate in the log.
Weigh = Callable[[Any], Mapping[str, float]]
Loss = Callable[[nn.Module, list[Any], Mapping[str, float]], LossOutput]


@dataclass(frozen=True)
class TrainingSummary:
    """``updates``: by group. ``resumed``: the step of the checkpoint that the run went on from, 0 for a new run."""

    steps: int
    resumed: int
    loss: float | None
    updates: dict[str, int]
    corrupt: int
    seconds: float


class OtherRankFailed(RuntimeError):
    """Another rank could not load its part of a batch, and raises why. Without this, the others would wait for it."""


@dataclass
class _State:
    """What a checkpoint keeps beside weights, moments and random states."""

    cursors: tuple[Cursor, ...]
    updates: dict[str, int]
    guard: guards.SpikeGuard
    step: int = 0
    corrupt: int = 0
    loss: float | None = None

    @staticmethod
    def restored(counters: Mapping[str, Any], spike_sigmas: float | None) -> "_State":
        """The state of a checkpoint; the guard's limit is the present one."""
        cursors = tuple(Cursor(**cursor) for cursor in counters["cursors"])
        guard = guards.SpikeGuard(**{**counters["guard"], "sigmas": spike_sigmas})
        return _State(**{**counters, "cursors": cursors, "guard": guard})


def train(
    model: nn.Module,
    groups: Sequence[Group],
    stream: Stream,
    weigh: Weigh,
    loss: Loss,
    config: LoopConfig,
    folder: str | Path,
    world: World | None = None,
    *,
    identity: Mapping[str, Any] | None = None,
    kept: Sequence[tuple[str, nn.Parameter]] = (),
    before_step: Callable[[int], None] = lambda step: None,
    flops: Callable[[Mapping[str, float]], float] | None = None,
    peak_flops: float | None = None,
    fresh: bool = False,
) -> TrainingSummary:
    """Train ``model`` in place; every rank calls it and ends with the same weights.

    Args:
        model: on ``world.device``, its weights equal on all ranks (or sharded by ``parallel.shard``), in the mode
            (train or eval) that the caller wants.
        groups: the parameters to train, float32. Only these are saved in checkpoints.
        loss: ``loss(model, samples, totals)`` of some samples, given the totals of the global batch.
        folder: path or URL for ``checkpoints/``, ``training.jsonl``, ``corrupt.jsonl`` and ``tensorboard/``.
        identity: JSON values of whatever else decides the result, such as the base model and the loss's options.
        kept: what changes while training without being trained (averages of weights), to be in checkpoints too.
        before_step: called on every rank before each update, with the update's number from 1.
        flops: the model's FLOPs of a global batch, given its totals (of ``weigh``); logged as ``flops_per_second``.
        peak_flops: FLOPs a second that one rank's device can do; the share that ``flops`` takes is logged as ``mfu``.
        fresh: discard the checkpoints that are there.

    Raises:
        ArtifactMismatch: the folder holds another run; the message names what differs.
        TrainingStopped: a guard ended the run (see ``guards``).
        Preempted: SIGTERM ended it; the next run goes on from the step that the message names.
        OtherRankFailed: another rank could not load its samples; that one raises what its source raised.
        SaveFailed, or what writing raised: a checkpoint could not be written; raised at a later step, or at the end.
        ValueError: the groups or what ``weigh`` returns do not fit.
    """
    world = world or World()
    started = time.perf_counter()
    _check(groups)
    named = [pair for group in groups for pair in group.parameters] + list(kept)
    optimizer = torch.optim.AdamW(
        [{"params": [p for _, p in g.parameters], "lr": 0.0, "weight_decay": g.weight_decay} for g in groups],
        betas=config.betas,
        eps=config.epsilon,
        fused=True,
    )
    described = _identity(groups, stream, config, identity or {})
    store = Store(str(folder), described, config.keep, world, config.background_saves)
    state = _State(stream.start(), {g.name: 0 for g in groups}, guards.SpikeGuard(config.spike_sigmas))
    _seed(config.seed, 0, world.rank)
    if fresh:
        store.discard()
    elif index := store.load(named, optimizer):
        state = _State.restored(index["counters"], config.spike_sigmas)
        if index["world_size"] != world.size:
            _seed(config.seed, state.step, world.rank)
        log.info("going on from step %d of %d in %s", state.step, config.steps, folder)
    resumed = state.step
    with contextlib.ExitStack() as stack:
        stack.callback(store.close)
        notice = stack.enter_context(Notice())
        run_log = None
        if world.main and resumed < config.steps:
            peak = None if peak_flops is None else peak_flops * world.size
            run_log = RunLog(str(folder), config.steps, resumed, config.label, config.tensorboard, peak)
            stack.callback(run_log.close)
        ahead = {"steps": config.read_ahead, "readers": config.readers}
        data = stack.enter_context(Ahead(stream, state.cursors, world.rank, world.size, **ahead))
        run = _Run(
            model, groups, stream, data, weigh, loss, flops, config, world, optimizer, state, store, notice, run_log
        )
        try:
            while state.step < config.steps:
                before_step(state.step + 1)
                figures = run.step()
                preempted = run.preempted and state.step < config.steps
                if state.step % config.checkpoint_every == 0 or state.step == config.steps or preempted:
                    if run_log:
                        run_log.publish()
                    store.save(state.step, named, optimizer, asdict(state))
                    world.report(figures)
                if preempted:
                    store.wait()
                    raise guards.Preempted(
                        f"SIGTERM ended the run after step {state.step} of {config.steps}, which is saved in {folder}: "
                        "the same command goes on from there"
                    )
            store.wait()
        except guards.TrainingStopped:  # on all ranks
            _finish_saving(store)
            raise
    if state.corrupt and not any(state.updates.values()):
        raise guards.TrainingStopped(f"nothing was learned: none of {state.corrupt} samples could be read")
    seconds = time.perf_counter() - started
    return TrainingSummary(state.step, resumed, state.loss, state.updates, state.corrupt, seconds)


def _finish_saving(store: Store) -> None:
    """Let the checkpoint on its way become whole; what goes wrong with it must not hide why the run stops."""
    try:
        store.wait()
    except Exception as error:
        log.error("the last checkpoint was not written: %s", error)


def updates_per_group(stream: Stream, weigh: Weigh, groups: Sequence[str], steps: int) -> dict[str, int]:
    """How many of the first ``steps`` global batches hold something of each group: what ``Group.steps`` wants.

    Reads every sample of these batches; meant for corpora in memory.
    """
    counts, cursors = dict.fromkeys(groups, 0), stream.start()
    for _ in range(steps):
        units, cursors = stream.plan(cursors)
        values = [value for unit in units if (value := stream.load(unit).value) is not None]
        present = {name for value in values for name, weight in weigh(value).items() if weight > 0}
        for name in present & counts.keys():
            counts[name] += 1
    return counts


def learning_rate_factor(config: LoopConfig, update: int, updates: int) -> float:
    """The share of its peak learning rate that a group has at its ``update``-th (from 0) of ``updates`` updates."""
    warmup = round(config.warmup_ratio * updates)
    if update < warmup:
        return (update + 1) / (warmup + 1)
    done = min(1.0, (update - warmup) / max(1, updates - warmup))
    return {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[config.schedule]


@dataclass
class _Run:
    """One process's part of a run."""

    model: nn.Module
    groups: Sequence[Group]
    stream: Stream
    data: Ahead
    weigh: Weigh
    loss: Loss
    flops: Callable[[Mapping[str, float]], float] | None
    config: LoopConfig
    world: World
    optimizer: torch.optim.Optimizer
    state: _State
    store: Store
    notice: Notice
    log: RunLog | None
    preempted: bool = False
    """Whether some rank had the notice in the last step, which all ranks know alike."""

    def __post_init__(self) -> None:
        self.sharded = any(parallel.is_sharded(p) for group in self.groups for _, p in group.parameters)

    def step(self) -> dict[str, float]:
        """One update; returns the step, the loss and the metrics of the global batch."""
        state, number, started = self.state, self.state.step + 1, time.perf_counter()
        taken, weights, failure = self._load()
        waited = time.perf_counter() - started
        totals = self._totals(taken.loaded if taken else (), weights, failure)
        assert taken is not None  # or it would have raised
        units, cursors, loaded = taken
        mine = part(units, self.world.rank, self.world.size)
        active = [group for group in self.groups if totals.get(group.name, 0) > 0]
        if totals and not totals.keys() & {group.name for group in self.groups}:
            raise ValueError(
                f"weigh gave totals for {sorted(totals)}, but no group is called so: the groups are "
                f"{[group.name for group in self.groups]}"
            )
        pairs = [(unit, item.value) for unit, item in zip(mine, loaded, strict=True)]
        # Where the method says what tokens are, samples of like length share a micro-batch: less padding.
        pairs.sort(key=lambda pair: 0.0 if pair[1] is None else self.weigh(pair[1]).get("tokens", 0.0))
        done = self._backward(units, pairs, totals) if active else []
        norms = self._reduce_gradients(active)
        loss, metrics = self._gather([output for _, output in done])
        if not all(map(math.isfinite, [loss, *norms.values()])):
            self._stop(loss, norms, done, totals)
        accepted = bool(active) and state.guard.accepts(
            loss, number, lambda: [sample for unit in units for sample in self.stream.ids(unit)]
        )
        rates = self._update(active, norms) if accepted else {}
        self.optimizer.zero_grad(set_to_none=True)
        state.step, state.cursors, state.loss = number, cursors, loss
        if self.log:
            row = {
                "step": number,
                "loss": loss,
                "metrics": metrics,
                "groups": {
                    g.name: {"total": totals[g.name], "norm": norms[g.name], "lr": rates.get(g.name, 0.0)}
                    for g in active
                },
                "epochs": {s.name: cursor.epoch for s, cursor in zip(self.stream.sources, cursors, strict=True)},
                "fingerprint": self.stream.fingerprint(units),
                "skipped": not accepted,
                "data_wait": round(waited / (time.perf_counter() - started), 4),
            }
            amounts = {"samples": sum(len(unit.indices) for unit in units), **totals}
            self.log.step(row, amounts, self.flops(totals) if self.flops and totals else None)
        return {"step": number, "loss": loss, **metrics}

    def _load(self) -> tuple[Step | None, dict[str, float], Exception | None]:
        """The next step and the weights of this rank's samples, or the error that all ranks have yet to hear of."""
        try:
            taken = self.data.take()
            return taken, _sum([self.weigh(item.value) for item in taken.loaded if item.value is not None]), None
        except Exception as error:
            return None, {}, error

    def _totals(
        self, loaded: Sequence[Loaded], weights: Mapping[str, float], failure: Exception | None
    ) -> dict[str, float]:
        """The totals of the global batch; ledgers its unreadable samples. Raises on all ranks where one has failed."""
        reason = None if failure is None else f"{type(failure).__name__}: {failure}"
        gathered = self.world.gather([weights, [bad for item in loaded for bad in item.corrupt], reason])
        if failure is not None:
            raise failure
        if failed := [f"rank {rank}: {reason}" for rank, (_, _, reason) in enumerate(gathered) if reason is not None]:
            raise OtherRankFailed(f"step {self.state.step + 1}: the batch could not be loaded; {'; '.join(failed)}")
        if corrupt := [bad for _, theirs, _ in gathered for bad in theirs]:
            if not self.state.corrupt and self.world.main:
                log.warning(
                    "samples cannot be read, and are left out; see corrupt.jsonl. The first one: %s", corrupt[0]
                )
            self.state.corrupt += len(corrupt)
            if self.log:
                self.log.corrupt(self.state.step + 1, corrupt)
            learned = any(self.state.updates.values()) or any(theirs for theirs, _, _ in gathered)
            if not learned and self.state.corrupt >= HOPELESS:
                raise guards.TrainingStopped(
                    f"step {self.state.step + 1}: none of the first {self.state.corrupt} samples could be read; the "
                    f"last one: {corrupt[-1]}. See corrupt.jsonl: give other data, or other settings"
                )
            if self.state.corrupt > self.config.max_corrupt:
                raise guards.TrainingStopped(
                    f"step {self.state.step + 1}: {self.state.corrupt} samples could not be read, but max_corrupt is "
                    f"{self.config.max_corrupt}; the last one: {corrupt[-1]}. See corrupt.jsonl; prepare the data again"
                )
        return _sum([theirs for theirs, _, _ in gathered])

    def _backward(
        self, units: Sequence[Unit], mine: Sequence[tuple[Unit, Any]], totals: Mapping[str, float]
    ) -> list[tuple[list[tuple[Unit, Any]], LossOutput]]:
        """Add up the gradients of this rank's part; returns what each micro-batch held and gave."""
        done = []
        # Under FSDP2 each pass is a collective, so all ranks make as many; who has no sample left takes any, times 0.
        largest = -(-len(units) // self.world.size)
        for start in range(0, largest, self.config.micro_batch):
            good = [pair for pair in mine[start : start + self.config.micro_batch] if pair[1] is not None]
            if not good and not self.sharded:
                continue
            values = [value for _, value in good] or [_any_sample(self.stream, units)]
            output = self._forward(values, totals)
            (output.loss if good else output.loss * 0).backward()
            if good:
                done.append((good, output))
        return done

    def _forward(self, values: list[Any], totals: Mapping[str, float]) -> LossOutput:
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            return self.loss(self.model, values, totals)

    def _reduce_gradients(self, active: Sequence[Group]) -> dict[str, float]:
        """Sum the gradients over the ranks and drop those of absent groups; returns the norm of each active group's."""
        for group in self.groups:
            for _, parameter in group.parameters:
                if group not in active:
                    parameter.grad = None
                elif parameter.grad is None:  # on this rank; with one rank it must come out as with several
                    parameter.grad = torch.zeros_like(parameter)
        if not active:
            return {}
        whole = [_gradients(group, sharded=False) for group in active]
        self.world.sum_([gradient for gradients in whole for gradient in gradients])
        squares = torch.stack([_square(gradients, self.world.device) for gradients in whole])
        if self.sharded:
            parts = torch.stack([_square(_gradients(group, sharded=True), self.world.device) for group in active])
            self.world.sum_([parts])
            squares += parts
        return dict(zip([group.name for group in active], squares.sqrt().tolist(), strict=True))

    def _gather(self, outputs: Sequence[LossOutput]) -> tuple[float, dict[str, float]]:
        """Loss and metrics of the global batch; with them travels what ranks must agree on between steps."""
        sums = _sum([{name: _number(pair[0]) for name, pair in output.metrics.items()} for output in outputs])
        weights = _sum([{name: _number(pair[1]) for name, pair in output.metrics.items()} for output in outputs])
        loss = sum(_number(output.loss) for output in outputs)
        gathered = self.world.gather([loss, sums, weights, self.store.status(), self.notice.given])
        losses, sums_of, weights_of, statuses, notices = zip(*gathered, strict=True)
        self.preempted = any(notices)
        self.store.advance(statuses)
        sums, weights = _sum(sums_of), _sum(weights_of)
        return sum(losses), {name: sums[name] / weights[name] for name in sums if weights[name]}

    def _update(self, active: Sequence[Group], norms: Mapping[str, float]) -> dict[str, float]:
        """Clip, set the learning rates and apply the gradients; returns the rate of each active group."""
        rates = {}
        for group, settings in zip(self.groups, self.optimizer.param_groups, strict=True):
            if group not in active:
                continue
            if group.clip_norm is not None and norms[group.name] > group.clip_norm:
                for sharded in (False, True):
                    if gradients := _gradients(group, sharded):
                        torch._foreach_mul_(gradients, group.clip_norm / norms[group.name])
            updates = self.state.updates[group.name]
            factor = learning_rate_factor(self.config, updates, group.steps or self.config.steps)
            settings["lr"] = rates[group.name] = group.learning_rate * factor
            self.state.updates[group.name] = updates + 1
        self.optimizer.step()
        return rates

    def _stop(
        self,
        loss: float,
        norms: Mapping[str, float],
        done: Sequence[tuple[list[tuple[Unit, Any]], LossOutput]],
        totals: Mapping[str, float],
    ) -> NoReturn:
        """Raise NonFinite on every rank, with the samples of all ranks."""
        if math.isfinite(loss):  # a gradient alone: any sample may be the cause
            suspects = [pair for pairs, _ in done for pair in pairs]
        else:
            suspects = [pair for pairs, output in done if not output.loss.isfinite() for pair in pairs]
            if not self.sharded:
                with torch.no_grad():
                    alone = [pair for pair in suspects if not self._forward([pair[1]], totals).loss.isfinite()]
                suspects = alone or suspects
        samples = [sample for unit, _ in suspects for sample in self.stream.ids(unit)]
        groups = sorted({name for _, value in suspects for name in self.weigh(value)} & norms.keys())
        gathered = self.world.gather([samples, groups])
        samples = [sample for theirs, _ in gathered for sample in theirs]
        groups = sorted({name for _, theirs in gathered for name in theirs})
        raise guards.non_finite(self.state.step + 1, loss, norms, samples, groups)


def _number(value: Tensor | float) -> float:
    return value.item() if isinstance(value, Tensor) else float(value)


def _sum(mappings: Sequence[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for mapping in mappings:
        for name, value in mapping.items():
            total[name] = total.get(name, 0.0) + float(value)
    return total


def _gradients(group: Group, sharded: bool) -> list[Tensor]:
    """The local gradients of a group's parameters that are, or are not, sharded."""
    chosen = [p for _, p in group.parameters if parallel.is_sharded(p) == sharded]
    return [parallel.local(p.grad) for p in chosen if p.grad is not None]


def _square(gradients: list[Tensor], device: torch.device) -> Tensor:
    """The square of the norm of all gradients together."""
    if not gradients:
        return torch.zeros((), device=device)
    return torch.stack(torch._foreach_norm(gradients)).square().sum()


def _any_sample(stream: Stream, units: Sequence[Unit]) -> Any:
    return next(value for unit in units if (value := stream.load(unit).value) is not None)


def _seed(seed: int, step: int, rank: int) -> None:
    """Seed torch, numpy and Python, on each rank differently."""
    mixed = int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])
    torch.manual_seed(mixed)
    np.random.seed(mixed)
    random.seed(mixed)


def _identity(groups: Sequence[Group], stream: Stream, config: LoopConfig, others: Mapping[str, Any]) -> dict[str, Any]:
    described = {
        group.name: {
            "elements": sum(p.numel() for _, p in group.parameters),
            "learning_rate": group.learning_rate,
            "weight_decay": group.weight_decay,
            "clip_norm": group.clip_norm,
            "steps": group.steps,
        }
        for group in groups
    }
    return {"loop": identity_fields(config), "groups": described, "stream": stream.identity(), **others}


def _check(groups: Sequence[Group]) -> None:
    names = [group.name for group in groups]
    parameters = [p for group in groups for _, p in group.parameters]
    keys = [name for group in groups for name, _ in group.parameters]
    if not parameters or len(set(names)) < len(names) or len(set(keys)) < len(keys):
        raise ValueError(f"groups need names and parameters, each once: groups {names}, {len(keys)} parameters")
    for name, parameter in (pair for group in groups for pair in group.parameters):
        if parameter.dtype != torch.float32 or not parameter.requires_grad:
            raise ValueError(
                f"parameter {name} is {parameter.dtype}, requires_grad={parameter.requires_grad}: what is trained must "
                "be float32 and require a gradient (precision bf16 computes in bfloat16 all the same)"
            )
