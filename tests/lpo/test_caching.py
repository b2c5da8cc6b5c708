"""List gradient caching against the plain gradient, computed here by one graph over all images."""

import dataclasses
import itertools
import os
import socket
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import toy_training as toy
from palate.lpo import objectives
from palate.lpo.caching import one_pass_loss, plain_loss, refuse_batch_statistics, two_pass_loss
from palate.training.loop import Group, LoopConfig, LossOutput, train
from palate.training.parallel import World, run_torchrun, shard
from palate.training.stream import ListSource, Stream

BETA, WIDTH = 5000.0, 12
LENGTHS = [4, 2, 3]
FORMS = {"plain": plain_loss, "two-pass": two_pass_loss, "one-pass": one_pass_loss}


class Adapted(nn.Module):
    """A small denoiser with dropout: frozen layers, of which the inner one has a LoRA."""

    def __init__(self, dropout: float = 0.2, dtype: torch.dtype = torch.float64, full: bool = False) -> None:
        super().__init__()
        self.enter, self.inner, self.leave = nn.Linear(WIDTH, 32), nn.Linear(32, 32), nn.Linear(32, WIDTH)
        self.down, self.up = nn.Linear(32, 4, bias=False), nn.Linear(4, 32, bias=False)
        self.dropout, self.norm = nn.Dropout(dropout), nn.GroupNorm(4, 32)
        generator = torch.Generator().manual_seed(5)
        for name, parameter in self.named_parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
            parameter.requires_grad_(full or name.startswith(("down", "up")))
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.dropout(self.enter(x).relu()))
        hidden = self.inner(hidden) + 0.1 * self.up(self.dropout(self.down(hidden)))
        return self.leave(self.dropout(hidden.relu()))


@dataclasses.dataclass
class Lists:
    """Ranked lists of ``LENGTHS`` images, the frozen network's errors, and the objective on all of them."""

    images: list[torch.Tensor]
    targets: list[torch.Tensor]
    reference: torch.Tensor
    mask: torch.Tensor

    def losses_of(self, errors_BM: torch.Tensor) -> torch.Tensor:
        reference_BM = objectives.to_lists(self.reference, self.mask)
        rewards_BM = objectives.implicit_rewards(errors_BM, reference_BM, BETA)
        return objectives.plackett_luce_loss(rewards_BM, self.mask, reduction="mean_terms")

    def objective(self, errors_N: torch.Tensor, *further: torch.Tensor) -> torch.Tensor:
        return self.losses_of(objectives.to_lists(errors_N, self.mask)).sum() / len(self.mask)

    def safe_objective(self, errors_N: torch.Tensor, residuals_NW: torch.Tensor) -> torch.Tensor:
        errors_BM = objectives.to_lists(errors_N, self.mask)
        columns = [objectives.to_lists(column, self.mask) for column in residuals_NW.unbind(1)]
        gram_BMM = objectives.output_gram(torch.stack(columns, dim=-1))
        return self.losses_of(objectives.safeguarded(errors_BM, self.losses_of, gram_BMM, 0.5)).sum()

    def rows(self, lengths: list[int]) -> list[list[int]]:
        """Chunks of so many images."""
        bounds = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
        return [list(range(*pair)) for pair in itertools.pairwise(bounds)]

    def errors(self, model: nn.Module) -> Callable[[list[int]], torch.Tensor]:
        def errors_of(chunk: list[int]) -> torch.Tensor:
            predicted = model(torch.stack([self.images[i] for i in chunk]))
            return (predicted - torch.stack([self.targets[i] for i in chunk])).square().mean(1)

        return errors_of

    def errors_and_residuals(self, model: nn.Module) -> Callable[[list[int]], tuple[torch.Tensor, torch.Tensor]]:
        def errors_of(chunk: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
            residuals = model(torch.stack([self.images[i] for i in chunk])) - torch.stack(
                [self.targets[i] for i in chunk]
            )
            return residuals.square().mean(1), residuals

        return errors_of


def make_lists(dtype: torch.dtype = torch.float64, lengths: list[int] = LENGTHS, shift: float = 0.0) -> Lists:
    generator = torch.Generator().manual_seed(1)
    count = sum(lengths)
    images = torch.randn(count, WIDTH, generator=generator).to(dtype)
    targets = torch.randn(count, WIDTH, generator=generator).to(dtype) + shift
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    lists = Lists(list(images), list(targets), torch.zeros(count, dtype=dtype), mask)
    model = Adapted(0.0, dtype)
    with torch.no_grad():
        # As if the training had changed each error by about a thousandth.
        lists.reference = lists.errors(model)(list(range(count)))
        lists.reference = lists.reference * (1 + 1e-3 * torch.randn(count, generator=generator).to(dtype))
    return lists


def gradient(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def plain_gradient(
    model: nn.Module, lists: Lists, chunks: list[list[int]], objective: Callable[..., torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient by one graph, chunk after chunk from seed 0: plain autograd, nothing of the library's."""
    model.zero_grad()
    torch.manual_seed(0)
    if objective is None:
        loss = lists.objective(torch.cat([lists.errors(model)(chunk) for chunk in chunks]))
    else:
        parts = [lists.errors_and_residuals(model)(chunk) for chunk in chunks]
        loss = objective(*(torch.cat(column) for column in zip(*parts, strict=True)))
    loss.backward()
    return loss.detach(), gradient(model)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


SINGLE, WHOLE, MIXED = [1] * sum(LENGTHS), LENGTHS, [1, 5, 3]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-3)])
@pytest.mark.parametrize(
    ("form", "chunks"),
    [("plain", WHOLE), ("two-pass", SINGLE), ("two-pass", WHOLE), ("two-pass", MIXED), ("one-pass", SINGLE)],
)
@pytest.mark.parametrize("full", [False, True])
def test_equals_the_plain_gradient_with_dropout(form, chunks, dtype, tolerance, full):
    model, lists = Adapted(0.2, dtype, full), make_lists(dtype)
    rows = lists.rows(chunks)
    expected_loss, expected = plain_gradient(model, lists, rows)
    after = torch.get_rng_state()
    model.zero_grad()
    torch.manual_seed(0)
    result = FORMS[form](model, rows, lists.errors(model), lists.objective)
    (3 * result.loss).backward()
    torch.testing.assert_close(result.loss.detach(), expected_loss)
    assert relative(gradient(model), 3 * expected) < tolerance
    assert torch.equal(torch.get_rng_state(), after)  # the next draw is that of plain training
    assert len(result.errors_N) == len(result.weights_N) == sum(LENGTHS)


@pytest.mark.parametrize("form", ["two-pass", "one-pass"])
def test_single_images_equal_one_batch_of_all_in_float32(form):
    """Without dropout, the plain gradient may take all images through the network at once."""
    model, lists = Adapted(0.0, torch.float32), make_lists(torch.float32)
    _, expected = plain_gradient(model, lists, [list(range(sum(LENGTHS)))])
    model.zero_grad()
    FORMS[form](model, lists.rows(SINGLE), lists.errors(model), lists.objective).loss.backward()
    assert relative(gradient(model), expected) < 1e-3


def test_dropout_that_is_not_replayed_would_show():
    model, lists = Adapted(), make_lists()
    rows = lists.rows(SINGLE)
    _, expected = plain_gradient(model, lists, rows)
    torch.manual_seed(1)
    model.zero_grad()
    two_pass_loss(model, rows, lists.errors(model), lists.objective).loss.backward()
    assert relative(gradient(model), expected) > 0.1


@pytest.mark.parametrize("form", FORMS)
def test_gradients_add_up_over_lists(form):
    model, lists = Adapted(0.0), make_lists()
    _, expected = plain_gradient(model, lists, lists.rows(SINGLE))
    model.zero_grad()
    losses = []
    for row, start in enumerate([0, 4, 6]):
        count = LENGTHS[row]
        one = Lists(
            lists.images[start : start + count],
            lists.targets[start : start + count],
            lists.reference[start : start + count],
            torch.ones(1, count, dtype=torch.bool),
        )
        losses.append(FORMS[form](model, one.rows([1] * count), one.errors(model), one.objective).loss / 3)
    sum(losses).backward()
    assert relative(gradient(model), expected) < 1e-6


@pytest.mark.parametrize("form", FORMS)
def test_without_gradients_only_the_value_is_computed(form):
    model, lists = Adapted(0.0), make_lists()
    expected, _ = plain_gradient(model, lists, lists.rows(SINGLE))
    model.zero_grad()
    with torch.no_grad():
        result = FORMS[form](model, lists.rows(SINGLE), lists.errors(model), lists.objective)
    torch.testing.assert_close(result.loss, expected)
    assert not result.loss.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("form", FORMS)
def test_autocast_covers_both_passes(form):
    model, lists = Adapted(0.2, torch.float32), make_lists(torch.float32)
    rows = lists.rows(SINGLE)
    autocast = []

    def errors_of(chunk: list[int]) -> torch.Tensor:
        autocast.append(torch.is_autocast_enabled("cpu"))
        predicted = model(torch.stack([lists.images[i] for i in chunk])).float()
        return (predicted - torch.stack([lists.targets[i] for i in chunk])).square().mean(1)

    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        expected_loss = lists.objective(torch.cat([errors_of(chunk) for chunk in rows]))
    expected_loss.backward()
    expected = gradient(model)
    model.zero_grad()
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = FORMS[form](model, rows, errors_of, lists.objective).loss
    loss.backward()
    torch.testing.assert_close(loss, expected_loss)
    # The plain gradient is itself summed in bfloat16, over the images that share a cast weight.
    assert relative(gradient(model), expected) < 2e-2
    assert len(autocast) == len(rows) * (3 if form == "two-pass" else 2)
    assert all(autocast)


def test_a_forward_without_a_graph_leaves_autocast_fit_for_one_with():
    model, lists = Adapted(0.0, torch.float32), make_lists(torch.float32)

    def errors_of(chunk: list[int]) -> torch.Tensor:
        return (model(torch.stack([lists.images[i] for i in chunk])).float() - 1).square().mean(1)

    def after(first: Callable[[], object]) -> torch.Tensor:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            first()
            error = errors_of([0]).sum()
        error.backward()
        return gradient(model)

    alone = after(lambda: None)
    assert torch.equal(after(lambda: two_pass_loss(model, lists.rows(SINGLE), errors_of, lists.objective)), alone)


def test_the_second_pass_leaves_the_random_state_alone():
    model, lists = Adapted(), make_lists()
    loss = two_pass_loss(model, lists.rows(SINGLE), lists.errors(model), lists.objective).loss
    torch.rand(7)  # such as another list's dropout
    before = torch.get_rng_state()
    loss.backward()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("layer", "refused"),
    [
        (nn.BatchNorm2d(3), True),
        (nn.SyncBatchNorm(3), True),
        (nn.BatchNorm1d(3).eval(), False),
        (nn.BatchNorm1d(3, track_running_stats=False).eval(), True),
        (nn.InstanceNorm2d(3, track_running_stats=True), True),
        (nn.InstanceNorm2d(3), False),
        (nn.GroupNorm(1, 3), False),
        (nn.LayerNorm(3), False),
    ],
)
def test_batch_statistics_are_refused(layer, refused):
    model = nn.Sequential(nn.Linear(3, 3), nn.ModuleDict({"norm": layer}))
    if not refused:
        refuse_batch_statistics(model)
        return
    with pytest.raises(ValueError, match=f"{type(layer).__name__} '1.norm' is in training mode"):
        refuse_batch_statistics(model)


@pytest.mark.parametrize("form", ["two-pass", "one-pass"])
def test_networks_with_batch_statistics_are_refused_by_both_forms(form):
    model, lists = Adapted(), make_lists()
    model.norm = nn.BatchNorm1d(32)
    with pytest.raises(ValueError, match="BatchNorm1d 'norm'"):
        FORMS[form](model, lists.rows(SINGLE), lists.errors(model), lists.objective)


def test_noise_from_a_generator_of_its_own_is_caught():
    model, lists = Adapted(0.0), make_lists()
    own = torch.Generator().manual_seed(0)

    def errors_of(chunk: list[int]) -> torch.Tensor:
        noise = torch.randn(len(chunk), WIDTH, generator=own, dtype=torch.float64)
        return (model(torch.stack([lists.images[i] for i in chunk])) - noise).square().mean(1)

    result = two_pass_loss(model, lists.rows(SINGLE), errors_of, lists.objective)
    with pytest.raises(RuntimeError, match="draws from a generator of its own"):
        result.loss.backward()


def peak_saved_bytes(work: Callable[[], None]) -> int:
    """The most bytes that graphs held at once."""
    held = peak = 0

    class Held:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor

    def release(size: int) -> None:
        nonlocal held
        held -= size

    def pack(tensor: torch.Tensor) -> Held:
        nonlocal held, peak
        size = tensor.numel() * tensor.element_size()
        kept = Held(tensor.detach())
        weakref.finalize(kept, release, size)
        held += size
        peak = max(peak, held)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        work()
    assert held == 0
    return peak


def test_memory_is_that_of_one_image_whatever_the_length():
    model = Adapted(full=True)

    def peak(form: str, m: int) -> int:
        lists = make_lists(lengths=[m, 1])

        def work() -> None:
            FORMS[form](model, lists.rows([1] * (m + 1)), lists.errors(model), lists.objective).loss.backward()

        return peak_saved_bytes(work)

    assert peak("plain", 8) > 3 * peak("plain", 1)
    assert peak("two-pass", 8) < 1.2 * peak("two-pass", 1)

    # The one-pass form keeps m gradients beside, which no graph saves; the sum of them is saved until `backward`.
    size = sum(parameter.numel() for parameter in model.parameters()) * 8
    assert peak("one-pass", 8) < 1.2 * peak("one-pass", 1) + size


@pytest.mark.parametrize("form", FORMS)
def test_the_safeguard_on_predictions_gives_the_same_gradient_in_every_form(form):
    model, lists = Adapted(), make_lists(shift=3.0)  # residuals share a direction, so that images conflict
    rows = lists.rows(SINGLE)
    unsafe_loss, unsafe = plain_gradient(model, lists, rows, lambda errors, residuals: 3 * lists.objective(errors))
    expected_loss, expected = plain_gradient(model, lists, rows, lists.safe_objective)
    torch.testing.assert_close(expected_loss, unsafe_loss)
    assert relative(unsafe, expected) > 1e-2
    model.zero_grad()
    torch.manual_seed(0)
    result = FORMS[form](model, rows, lists.errors_and_residuals(model), lists.safe_objective)
    result.loss.backward()
    torch.testing.assert_close(result.loss.detach(), expected_loss)
    assert relative(gradient(model), expected) < 1e-6


def test_the_safeguard_on_parameters_keeps_the_pulled_images_errors_from_growing():
    """A small step down the gradient, with and without, on a list whose images are nearly the same picture."""
    model, lists = Adapted(0.0), make_lists(lengths=[4])
    lists.images = [lists.images[0] + 0.05 * image for image in lists.images]
    lists.targets = [lists.targets[0] + 0.05 * target for target in lists.targets]
    rows = lists.rows([1] * 4)
    with torch.no_grad():
        lists.reference = lists.errors(model)(list(range(4)))  # as at the start: all scores 0
    # The last images are pushed away hard, and they look like the first.
    support = torch.tensor([[0.1, 0.1, 3.0, 1.0]])

    def objective(errors_N: torch.Tensor) -> torch.Tensor:
        rewards = objectives.implicit_rewards(errors_N, lists.reference, BETA)
        return objectives.plackett_luce_loss(rewards[None], lists.mask, term_weights_BM=support).sum()

    def growth(mu: float | None) -> float:
        stepped = Adapted(0.0)
        result = one_pass_loss(stepped, rows, lists.errors(stepped), objective, safeguard_mu=mu)
        result.loss.backward()
        with torch.no_grad():
            for parameter in stepped.parameters():
                if parameter.grad is not None:
                    parameter -= 1e-8 * parameter.grad
            change_N = lists.errors(stepped)(list(range(4))) - result.errors_N
        return (result.weights_N.clamp(min=0) * change_N).sum().item()

    assert growth(None) > 0
    assert growth(0.0) <= 1e-9 * growth(None)
    assert growth(0.5) < 0


@pytest.mark.parametrize("form", FORMS)
def test_what_does_not_fit_is_refused(form):
    model, lists = Adapted(), make_lists()
    rows, errors_of = lists.rows(SINGLE), lists.errors(model)
    with pytest.raises(ValueError, match="no image to take a loss of"):
        FORMS[form](model, [], errors_of, lists.objective)
    with pytest.raises(ValueError, match=r"one number for all images, got shape \(9,\)"):
        FORMS[form](model, rows, errors_of, lambda errors: errors)
    with pytest.raises(ValueError, match=r"in float32, got \(1,\) in torch.bfloat16"):
        FORMS[form](model, rows, lambda chunk: errors_of(chunk).bfloat16(), lists.objective)
    if form == "one-pass":
        with pytest.raises(ValueError, match="one image a chunk, but chunk 0 has 4"):
            one_pass_loss(model, lists.rows(WHOLE), errors_of, lists.objective)
    if form != "plain":
        with pytest.raises(ValueError, match="no parameter of the model requires a gradient"):
            FORMS[form](model.requires_grad_(False), rows, errors_of, lists.objective)


def test_a_parameter_that_no_image_reaches_gets_gradient_0():
    model, lists = Adapted(0.0), make_lists()
    model.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
    one_pass_loss(model, lists.rows(SINGLE), lists.errors(model), lists.objective).loss.backward()
    assert model.unused.grad.tolist() == [0.0, 0.0]


class Blocks(nn.Module):
    """A network to shard, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.2)) for _ in range(2))
        self.leave = nn.Linear(8, 8)
        for parameter in self.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.leave(x)


def sharded(rank: int, port: int, queue) -> None:
    """One of two ranks, each with a list of its own: how far the sharded two-pass gradient is from the plain sum."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    images = torch.randn(3, 1, 8, generator=torch.Generator().manual_seed(rank))

    def objective(errors_N: torch.Tensor) -> torch.Tensor:
        rewards = objectives.implicit_rewards(errors_N, torch.ones_like(errors_N), 10.0)
        return objectives.plackett_luce_loss(rewards[None], torch.ones(1, 3, dtype=torch.bool)).sum()

    def worker(config: None, world: World) -> None:
        model = Blocks()
        torch.manual_seed(rank)
        objective(torch.cat([(model(image) - 1).square().mean(1) for image in images])).backward()
        expected = [parameter.grad for parameter in model.parameters()]
        world.sum_(expected)
        model = Blocks()
        shard(model, model.blocks, world)
        torch.manual_seed(rank)
        arguments = model, list(images), lambda image: (model(image) - 1).square().mean(1), objective
        two_pass_loss(*arguments).loss.backward()
        found = [parameter.grad.full_tensor() for parameter in model.parameters()]
        try:
            one_pass_loss(*arguments)
            refusal = ""
        except ValueError as error:
            refusal = str(error)
        distance = relative(*(torch.cat([p.flatten() for p in values]) for values in (found, expected)))
        queue.put((distance, refusal))

    run_torchrun(worker, None)


def test_sharded_parameters():
    queue = toy.FORKS.Queue()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    processes = [toy.FORKS.Process(target=sharded, args=(rank, port, queue)) for rank in range(2)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    for distance, refusal in results:
        assert distance < 1e-4
        assert "sharded (FSDP2): use the two-pass form" in refusal


def trained(form: str, folder: Path) -> dict[str, torch.Tensor]:
    """Adapters after some steps of the train loop, by one form."""
    lists, model = make_lists(torch.float32, [3] * 8), Adapted(0.0, torch.float32)

    def loss(model: nn.Module, samples: list[int], totals: dict[str, float]) -> LossOutput:
        result = []
        for index in samples:
            rows = range(3 * index, 3 * index + 3)
            one = Lists(
                [lists.images[i] for i in rows],
                [lists.targets[i] for i in rows],
                lists.reference[list(rows)],
                torch.ones(1, 3, dtype=torch.bool),
            )
            result.append(FORMS[form](model, one.rows([1] * 3), one.errors(model), one.objective).loss)
        return LossOutput(torch.stack(result).sum() / totals["lora"])

    stream = Stream([ListSource("lists", list(range(8)), [str(i) for i in range(8)])], 4, seed=0)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    config = LoopConfig(6, micro_batch=2, checkpoint_every=6, tensorboard=False)
    train(
        model, [Group("lora", named, 1e-3, clip_norm=1.0)], stream, lambda sample: {"lora": 1.0}, loss, config, folder
    )
    return {name: p.detach() for name, p in named}


def test_the_train_loop_gives_the_same_adapters_by_every_form(tmp_path):
    plain = trained("plain", tmp_path / "plain")
    start = dict(Adapted(0.0, torch.float32).named_parameters())
    for form in ("two-pass", "one-pass"):
        found = trained(form, tmp_path / form)
        for name, value in plain.items():
            moved = value - start[name].detach()
            assert relative(found[name] - start[name].detach(), moved) < 1e-3
