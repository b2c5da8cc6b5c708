"""Diffusion-LPO's step beside the pairwise step that one would write after diffusers' script, in one run.

    python benchmarks/lpo.py --out benchmarks/out/lpo.json
    python benchmarks/lpo.py --size sd15 --device cuda --precision bf16      # random weights of SD1.5's shape

Everything is a step of a LoRA on a U-Net with random weights: the reference's pass with the adapter off, the pass with
gradient, the backward pass, AdamW. Systems take turns; a figure is the median over the turns, a ratio the median of the
turns' ratios.

    list of 8   LPO by each form of gradient caching, GP-DPO on shared scores, and our adjacent pairs, against a plain
                DPO step on all its 28 pairs and on its 7 adjacent ones
    pairs       ours at m = 2 against the plain step on the same images
    encodings   the plain step with what the VAE and the text encoder gave once, against encoding in every step
    memory      peak of a process that takes one list of m images, by m and form (a process each)
"""

import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import combinations, pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from palate import config as configs
from palate import progress
from palate.config import scale
from palate.lpo.denoising import Conditioning, noise_schedule
from palate.lpo.networks import ATTENTION, TRAINED
from palate.lpo.samples import ListSample, Order
from palate.lpo.training import Denoiser, ObjectiveConfig, TuneConfig, step_loss


@dataclass(frozen=True)
class Size:
    """Shapes of a base model: side of its latents, text tokens and width, and the U-Net's own settings."""

    side: int
    tokens: int
    width: int
    unet: dict[str, Any]
    vae: tuple[int, ...]
    pooled: int | None = None


SIZES = {
    "small": Size(
        side=32,
        tokens=77,
        width=256,
        unet={
            "block_out_channels": (64, 128),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": 4,
        },
        vae=(32, 64, 64, 64),
    ),
    "sd15": Size(side=64, tokens=77, width=768, unet={}, vae=(128, 256, 512, 512)),
    "sdxl": Size(
        side=128,
        tokens=77,
        width=2048,
        unet={
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
            "use_linear_projection": True,
        },
        vae=(128, 256, 512, 512),
        pooled=1280,
    ),
}


@dataclass(frozen=True)
class LpoBenchmark:
    """What to measure; see the module's text."""

    out: str = scale("benchmarks/out/lpo.json")
    """Where the figures go."""
    size: Literal["small", "sd15", "sdxl"] = "small"
    """Whose shape the U-Net has; "small" is for a CPU."""
    device: str = "cpu"
    """Where it runs."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the passes."""
    threads: int = 2
    """Of torch."""
    turns: int = 5
    """That the systems take."""
    lengths: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Of the lists whose memory is measured; 1 is a list's first image denoised."""
    rank: int = 16
    """Of the LoRA."""


@dataclass(frozen=True, eq=False)
class Bench:
    """A denoiser with its LoRA and optimizer."""

    config: LpoBenchmark
    size: Size
    denoiser: Denoiser
    optimizer: torch.optim.Optimizer

    @property
    def network(self) -> Any:
        return self.denoiser.network

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.config.device != "cpu":
            torch.cuda.synchronize()

    def autocast(self) -> Any:
        return torch.autocast(self.config.device, torch.bfloat16, enabled=self.config.precision == "bf16")


def bench_of(config: LpoBenchmark) -> Bench:
    size = SIZES[config.size]
    torch.manual_seed(0)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    unet = UNet2DConditionModel(sample_size=size.side, cross_attention_dim=size.width, **size.unet)
    unet.to(config.device, dtype).requires_grad_(False)
    unet.add_adapter(LoraConfig(r=config.rank, lora_alpha=config.rank, target_modules=list(ATTENTION)), TRAINED)
    parameters = [p for name, p in unet.named_parameters() if "lora_" in name]
    for parameter in parameters:
        parameter.data = 0.01 * torch.randn_like(parameter, dtype=torch.float32)
        parameter.requires_grad_(True)
    unet.train()
    family = "sdxl" if size.pooled else "sd"
    denoiser = Denoiser(unet, family, noise_schedule(scheduler()), partial(Without, unet))
    return Bench(config, size, denoiser, torch.optim.AdamW(parameters, lr=1e-5))


class Without:
    """The network with its adapter off."""

    def __init__(self, network: Any) -> None:
        self.network = network

    def __enter__(self) -> nn.Module:
        self.network.disable_adapters()
        return self.network  # type: ignore[no-any-return]

    def __exit__(self, *_: object) -> None:
        self.network.enable_adapters()


def scheduler() -> DDPMScheduler:
    return DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


def list_of(bench: Bench, length: int, seed: int = 0) -> ListSample:
    """A drawn list of random latents, as the trainer gets it."""
    size, generator = bench.size, torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    shared = normal(1, 4, size.side, size.side).expand(length, -1, -1, -1)
    given = Conditioning(
        text_NLD=normal(1, size.tokens, size.width).expand(length, -1, -1),
        pooled_NP=None if size.pooled is None else normal(1, size.pooled).expand(length, -1),
        time_ids_N6=None if size.pooled is None else torch.tensor([[8.0 * size.side] * 6]).expand(length, -1),
    )
    index_M = torch.randint(1000, (1,), generator=generator).expand(length)
    latents = normal(length, 4, size.side, size.side)
    return ListSample(Order(tuple(range(length))), latents, shared, index_M, given, 1.0, 0.5)


def our_step(bench: Bench, samples: Sequence[ListSample], learn: ObjectiveConfig, tune: TuneConfig) -> None:
    with bench.autocast():
        output = step_loss(
            bench.network,
            list(samples),
            {"lists": float(len(samples))},
            denoiser=bench.denoiser,
            objective=learn,
            config=tune,
        )
    output.loss.backward()
    bench.update()


def plain_step(bench: Bench, pairs: Sequence[tuple[ListSample, int, int]], at_once: int = 4) -> None:
    """Diffusion-DPO as diffusers' script has it: winners, then losers, concatenated; the reference by adapter off.

    ``pairs``: list, winner's and loser's place; gradients of ``at_once`` pairs at a time are added up.
    """
    noising, device = scheduler(), bench.config.device
    for start in range(0, len(pairs), at_once):
        some = pairs[start : start + at_once]
        where = [(sample, place) for side in (1, 2) for sample, *places in some for place in [places[side - 1]]]

        def rows(name: str, where: Any = where) -> Any:
            values = [getattr(sample.given, name) for sample, _ in where]
            if values[0] is None:
                return None
            return torch.stack([value[place] for value, (_, place) in zip(values, where, strict=True)]).to(device)

        latents = torch.stack([sample.latents_MCHW[place] for sample, place in where]).to(device)
        noise = torch.stack([sample.noise_MCHW[place] for sample, place in where]).to(device)
        times = torch.stack([sample.index_M[place] for sample, place in where]).to(device)
        noisy = noising.add_noise(latents, noise, times)
        text, pooled = rows("text_NLD"), rows("pooled_NP")
        added = None if pooled is None else {"text_embeds": pooled, "time_ids": rows("time_ids_N6")}

        def errors(
            noisy: Any = noisy, times: Any = times, text: Any = text, noise: Any = noise, added: Any = added
        ) -> Any:
            predicted = bench.network(noisy, times, text, added_cond_kwargs=added).sample
            return F.mse_loss(predicted.float(), noise.float(), reduction="none").mean(dim=(1, 2, 3)).chunk(2)

        with bench.autocast():
            won, lost = errors()
            bench.network.disable_adapters()
            with torch.no_grad():
                base_won, base_lost = errors()
            bench.network.enable_adapters()
            logits = -0.5 * 5000.0 * ((won - lost) - (base_won - base_lost))
            loss = -F.logsigmoid(logits).sum() / len(pairs)
        loss.backward()
    bench.update()


Step = Callable[[], None]


def take_turns(steps: dict[str, Step], turns: int, label: str) -> dict[str, list[float]]:
    """Seconds of each step in each turn, after one that is not counted."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for turn in progress.track(range(turns + 1), label):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn:
                found[name].append(time.perf_counter() - start)
    return found


def ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def of_eight(bench: Bench) -> dict[str, list[float]]:
    sample = list_of(bench, 8)
    lpo = ObjectiveConfig(objective="lpo")

    def ours(learn: ObjectiveConfig, **tune: Any) -> Step:
        return lambda: our_step(bench, [sample], learn, TuneConfig(**tune))

    return take_turns(
        {
            "lpo": ours(lpo),
            "lpo two-pass": ours(lpo, caching="two-pass", chunk=1),
            "lpo two-pass, 4 at once": ours(lpo, caching="two-pass", chunk=4),
            "lpo one-pass": ours(lpo, caching="one-pass"),
            "gp-dpo": ours(ObjectiveConfig(objective="gp-dpo")),
            "adjacent pairs": ours(ObjectiveConfig(objective="dpo", pairs="adjacent")),
            "plain DPO, 28 pairs": lambda: plain_step(bench, [(sample, j, k) for j, k in combinations(range(8), 2)]),
            "plain DPO, 7 adjacent pairs": lambda: plain_step(bench, [(sample, j, k) for j, k in pairwise(range(8))]),
        },
        bench.config.turns,
        "list of 8",
    )


def of_pairs(bench: Bench) -> dict[str, list[float]]:
    samples = [list_of(bench, 2, seed) for seed in range(4)]
    learn = ObjectiveConfig(objective="lpo")
    return take_turns(
        {
            "ours": lambda: our_step(bench, samples, learn, TuneConfig()),
            "plain DPO": lambda: plain_step(bench, [(sample, 0, 1) for sample in samples]),
        },
        2 * bench.config.turns,
        "pairs",
    )


def of_encodings(bench: Bench) -> dict[str, list[float]]:
    """A plain step alone, and with its images and texts encoded first."""
    size, device = bench.size, bench.config.device
    dtype = torch.bfloat16 if bench.config.precision == "bf16" else torch.float32
    blocks = len(size.vae)
    vae = AutoencoderKL(
        block_out_channels=size.vae,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        layers_per_block=2,
        latent_channels=4,
    ).to(device, dtype)
    text = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=size.width, intermediate_size=4 * size.width, num_hidden_layers=12, num_attention_heads=8
        )
    ).to(device, dtype)
    samples = [list_of(bench, 2, seed) for seed in range(4)]
    images = torch.rand(8, 3, 8 * size.side, 8 * size.side, device=device, dtype=dtype) * 2 - 1
    tokens = torch.randint(1000, (4, size.tokens), device=device)
    pairs = [(sample, 0, 1) for sample in samples]

    def encoding() -> None:
        with torch.no_grad():
            vae.encode(images).latent_dist.sample()
            text(tokens)
        plain_step(bench, pairs)

    return take_turns(
        {"encoded once": lambda: plain_step(bench, pairs), "encoded in each step": encoding},
        bench.config.turns,
        "encodings",
    )


def peak(task: tuple[str, int], config: LpoBenchmark) -> float:
    """MiB at the peak of a process that takes two steps on a list of so many images."""
    form, length = task
    torch.set_num_threads(config.threads)
    bench = bench_of(config)
    # One image cannot be ranked: the floor is one image denoised.
    sample, learn = list_of(bench, max(2, length)), ObjectiveConfig(objective="lpo")
    if length == 1:
        sample, learn = list_of(bench, 1), ObjectiveConfig(objective="denoising")
    gc.collect()
    for _ in range(2):
        our_step(bench, [sample], learn, TuneConfig(caching=form, chunk=1))  # type: ignore[arg-type]
    if config.device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**20
    # Not getrusage's ru_maxrss, which a child takes over from its parent.
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))) / 1024


def memory(config: LpoBenchmark) -> dict[str, dict[str, float]]:
    tasks = [(form, length) for form in ("none", "two-pass", "one-pass") for length in config.lengths]
    found: dict[str, dict[str, float]] = {}
    # A process each, as a peak is a process's.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        peaks = pool.map(partial(peak, config=config), tasks)
        for (form, length), mib in zip(tasks, progress.track(peaks, "memory", len(tasks)), strict=True):
            found.setdefault(form, {})[str(length)] = mib
    return found


def main() -> None:
    config = configs.parse(LpoBenchmark, __doc__)
    torch.set_num_threads(config.threads)
    bench = bench_of(config)
    count = sum(parameter.numel() for parameter in bench.network.parameters())
    eight, two, encodings = of_eight(bench), of_pairs(bench), of_encodings(bench)
    del bench
    peaks = memory(config)
    print(f"\nU-Net of {count / 1e6:.1f}M parameters, latents of {SIZES[config.size].side} a side, {config.device}\n")
    print("| a list of 8 | seconds | images/s | plain step on its 28 pairs, over it |\n|---|--:|--:|--:|")
    for name, seconds in eight.items():
        middle, times = statistics.median(seconds), ratio(eight["plain DPO, 28 pairs"], seconds)
        print(f"| {name} | {middle:.3f} | {8 / middle:.2f} | {times:.2f} |")
    print(
        f"\nadjacent pairs, plain over ours: {ratio(eight['plain DPO, 7 adjacent pairs'], eight['adjacent pairs']):.2f}"
    )
    print(f"four pairs, plain over ours: {ratio(two['plain DPO'], two['ours']):.2f}")
    print(f"encoding in each step over once: {ratio(encodings['encoded in each step'], encodings['encoded once']):.2f}")
    print("\n| peak memory, MiB | " + " | ".join(f"m = {m}" for m in config.lengths) + " |")
    print("|---|" + "--:|" * len(config.lengths))
    for form, found in peaks.items():
        print(f"| caching {form} | " + " | ".join(f"{mib:.0f}" for mib in found.values()) + " |")
    path = Path(config.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"config": configs.to_dict(config), "torch": torch.__version__, "parameters": count}
    results = {"list of 8": eight, "pairs": two, "encodings": encodings, "memory": peaks}
    path.write_text(json.dumps({**content, **results}, indent=2) + "\n")
    print(path)


if __name__ == "__main__":
    main()
