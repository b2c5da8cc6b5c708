"""Serving text to many people: Palate's engine beside what one would use instead, on the same prompts, in one run.

    python benchmarks/serving.py --out benchmarks/out/serving.json

32 requests of 8 people in 4 clusters, 64 new tokens each, greedy; adapters, head and vectors are random, as what they
are takes no time, and nothing ends an answer early. Each system gets the requests all at once and staggered. What is
not a stream is shown to its reader when it is complete, so its first token comes with its last.

    base               the bare base model in the engine: the ceiling
    card, card-qv      clusters' adapters on all linear layers, or on q and v only, with everyone's vector
    one-by-one         transformers' generate(), a request at a time, bare base model
    peft-batches       generate() with PEFT's adapter_names on batches of what has arrived
    switching          an adapter for each person: set_adapter() and generate(), in the order of arrival
    switching-grouped  the same with a person's requests in one batch
"""

import asyncio
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from torch import nn

from palate import config as configs
from palate import progress
from palate.card import adapters
from palate.card.correction import FeatureMap, Head
from palate.config import scale
from palate.models.causal_lm import LoadedModel, load_causal_lm, render_prompt
from palate.serving.engine import Engine, Request
from palate.serving.worker import EngineWorker

TOPICS = ("a bridge", "the weather", "an old radio", "a lost key", "two dogs", "a train", "cold soup", "a garden")


@dataclass(frozen=True)
class ServingBenchmark:
    """What to measure; see the module's text."""

    out: str = scale("benchmarks/out/serving.json")
    """Where the figures go, and a plot beside them."""
    model: str = "smollm2"
    """Base model."""
    device: str = "cpu"
    """Where it runs."""
    threads: int = 2
    """Of torch."""
    requests: int = 32
    """Requests of one measurement."""
    people: int = 8
    """Whose requests these are, in turns."""
    clusters: int = 4
    """Cluster adapters."""
    tokens: int = 64
    """New tokens of each answer."""
    batch: int = 16
    """Slots of the engine, and the largest static batch."""
    gather_steps: int = 4
    """Steps that a prompt may wait for others in the engine, as the service has it."""
    gap: float = 0.25
    """Seconds between arrivals, where they are staggered."""
    concurrency: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """Of the curve."""
    repeats: int = 3
    """Turns that the systems take; ratios are medians over them."""
    only: tuple[str, ...] = ()
    """Names of the systems to measure; all when empty."""


@dataclass(frozen=True)
class Job:
    """One request: whose, and the prompt."""

    person: int
    prompt_ids: list[int]


@dataclass(frozen=True)
class Timing:
    """When each request's tokens were there, in seconds after its arrival, and how long the whole took."""

    tokens: list[list[float]]
    seconds: float

    def figures(self) -> dict[str, float]:
        firsts = [times[0] for times in self.tokens]
        between = [b - a for times in self.tokens for a, b in pairwise(times)]
        count = sum(map(len, self.tokens))
        return {
            "tokens_per_second": count / self.seconds,
            "first_p50": quantile(firsts, 0.5),
            "first_p95": quantile(firsts, 0.95),
            "between_p50": quantile(between, 0.5),
            "between_p95": quantile(between, 0.95),
        }


def quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


System = Callable[[Sequence[Job], float], Timing]  # jobs and the seconds between their arrivals


def engine_system(
    loaded: LoadedModel, rows: adapters.RowMask | None, head: Head | None, config: ServingBenchmark, slots: int
) -> System:
    """Palate's engine; with ``head`` everybody has a vector."""
    longest = 256 + config.tokens

    def run(jobs: Sequence[Job], gap: float) -> Timing:
        engine = Engine(loaded, rows, head, slots=slots, max_length=longest, gather_steps=config.gather_steps)
        vectors = torch.randn(config.people, head.width, generator=torch.Generator().manual_seed(1)) if head else None
        times: dict[int, list[float]] = {}
        arrived: dict[int, float] = {}
        order: list[int] = []
        start, sent = time.perf_counter(), 0
        while sent < len(jobs) or not engine.idle:
            now = time.perf_counter() - start
            while sent < len(jobs) and sent * gap <= now:
                job = jobs[sent]
                request = Request(
                    job.prompt_ids,
                    adapter=job.person % config.clusters if rows else adapters.BASE,
                    vector_J=None if vectors is None else vectors[job.person],
                    beta=0.0 if vectors is None else 1.0,
                    max_new_tokens=config.tokens,
                )
                id = engine.submit(request, stream=True)
                order.append(id)
                arrived[id], times[id] = sent * gap, []
                sent += 1
            if engine.idle:
                time.sleep(max(0.0, sent * gap - (time.perf_counter() - start)))
                continue
            for event in engine.step():
                times[event.id].append(time.perf_counter() - start - arrived[event.id])
        return Timing([times[id] for id in order], time.perf_counter() - start)

    return run


def static_system(
    model: Any,
    loaded: LoadedModel,
    config: ServingBenchmark,
    batch: int,
    prepare: Callable[[Sequence[Job]], dict[str, Any]],
    grouped: bool = False,
) -> System:
    """``generate()`` on batches of what has arrived; ``prepare`` says what a batch needs beside its prompts."""

    def run(jobs: Sequence[Job], gap: float) -> Timing:
        start = time.perf_counter()
        waiting = list(enumerate(jobs))
        times: list[list[float]] = [[] for _ in jobs]
        while waiting:
            now = time.perf_counter() - start
            arrived = [one for one in waiting if one[0] * gap <= now]
            if not arrived:
                time.sleep(max(0.0, waiting[0][0] * gap - now))
                continue
            if grouped:
                arrived = [one for one in arrived if one[1].person == arrived[0][1].person]
            chosen = arrived[:batch]
            generate(
                model, loaded, [job.prompt_ids for _, job in chosen], config.tokens, prepare([j for _, j in chosen])
            )
            done = time.perf_counter() - start
            for index, _ in chosen:
                times[index] = [done - index * gap] * config.tokens
            waiting = [one for one in waiting if one not in chosen]
        return Timing(times, time.perf_counter() - start)

    return run


def generate(model: Any, loaded: LoadedModel, prompts: Sequence[list[int]], tokens: int, extra: dict[str, Any]) -> None:
    """Greedy, left-padded, exactly ``tokens`` new tokens."""
    width = max(map(len, prompts))
    pad = loaded.eos_ids[0]
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=loaded.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=loaded.device)
    with torch.no_grad():
        model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            pad_token_id=pad,
            **extra,
        )


def packed(config: ServingBenchmark, targets: tuple[str, ...]) -> tuple[LoadedModel, adapters.RowMask]:
    loaded = load_causal_lm(config.model, device=config.device)
    rows = adapters.pack(loaded.model, config.clusters, adapters.LoraConfig(targets=targets))
    for _, layer in adapters.packed_layers(loaded.model):
        layer.requires_grad_(False)
        for B in layer.B:
            nn.init.normal_(B, std=0.01)
    return endless(loaded), rows


def with_peft(config: ServingBenchmark, count: int) -> tuple[PeftModel, LoadedModel]:
    loaded = load_causal_lm(config.model, device=config.device)
    shape = PeftConfig(r=8, lora_alpha=16, target_modules=list(adapters.ALL_LINEAR), init_lora_weights=False)
    model = get_peft_model(loaded.model, shape, adapter_name="0")
    for number in range(1, count):
        model.add_adapter(str(number), shape)
    return model.eval(), loaded


def endless(loaded: LoadedModel) -> LoadedModel:
    """The same model without a token that ends an answer."""
    return dataclasses.replace(loaded, eos_ids=(-1,))


def random_head(loaded: LoadedModel, width: int = 64) -> Head:
    """A head of the default shape that changes little: four layers, 50 candidates."""
    d, vocabulary = loaded.fingerprint["hidden_size"], loaded.fingerprint["vocab_size"]
    layers = tuple(sorted({max(1, round(loaded.fingerprint["layers"] * share)) for share in (0.6, 0.75, 0.9, 1.0)}))
    features = FeatureMap(layers, torch.zeros(len(layers), d), torch.ones(len(layers), d), torch.eye(d))
    return Head(features, torch.randn(d, width) / d, torch.randn(vocabulary, width) / width, top_k=50)


def beside(
    config: ServingBenchmark, loaded: LoadedModel, rows: adapters.RowMask, jobs: Sequence[Job]
) -> dict[str, float]:
    """Which share of their rate running streams keep while a new person's texts go through the model beside them.

    Both parts are of one run, so that a machine whose speed changes changes both: the rest of the time is theirs.
    """
    spent = [0.0]

    def passes() -> Any:
        ids = torch.tensor([jobs[0].prompt_ids + jobs[1].prompt_ids], device=loaded.device)
        while True:
            start = time.perf_counter()
            with torch.no_grad():
                rows.set(torch.zeros(1, dtype=torch.long))
                loaded.model(input_ids=ids)
            spent[0] += time.perf_counter() - start
            yield

    async def streams(worker: EngineWorker) -> tuple[float, float]:
        """Seconds until all have ended, and seconds of the job within."""

        async def one(job: Job) -> None:
            request = Request(job.prompt_ids, adapter=job.person % config.clusters, max_new_tokens=config.tokens)
            async for _ in worker.stream(request):
                pass

        running = [asyncio.create_task(one(job)) for job in jobs[:8]]
        await asyncio.sleep(0)
        start = time.perf_counter()
        worker.run_beside(passes())
        await asyncio.gather(*running)
        return time.perf_counter() - start, spent[0]

    worker = EngineWorker(Engine(loaded, rows, slots=8, max_length=256 + config.tokens), max_waiting=8)
    seconds, job_seconds = asyncio.run(streams(worker))
    worker.stop()
    return {"seconds": seconds, "job_seconds": job_seconds, "kept": 1 - job_seconds / seconds}


def main() -> None:
    config = configs.parse(ServingBenchmark, __doc__)
    torch.set_num_threads(config.threads)
    torch.manual_seed(0)
    base = load_causal_lm(config.model, device=config.device)
    jobs = [
        Job(
            number % config.people,
            render_prompt(base, f"Write a short note about {TOPICS[number % 8]}, number {number}."),
        )
        for number in range(config.requests)
    ]
    plain = load_causal_lm(config.model, device=config.device)  # the engine exchanges base's linear layers
    head = random_head(base)
    all_linear, all_rows = packed(config, adapters.ALL_LINEAR)
    attention, attention_rows = packed(config, adapters.ATTENTION)
    clusters_model, clusters_loaded = with_peft(config, config.clusters)
    people_model, people_loaded = with_peft(config, config.people)

    def names(chosen: Sequence[Job]) -> dict[str, Any]:
        return {"adapter_names": [str(job.person % config.clusters) for job in chosen]}

    def switch(chosen: Sequence[Job]) -> dict[str, Any]:
        people_model.set_adapter(str(chosen[0].person))
        return {}

    batch = config.batch
    systems: dict[str, System] = {
        "base": engine_system(endless(base), None, None, config, batch),
        "card": engine_system(all_linear, all_rows, head, config, batch),
        "card-qv": engine_system(attention, attention_rows, head, config, batch),
        "one-by-one": static_system(plain.model, plain, config, 1, lambda chosen: {}),
        "peft-batches": static_system(clusters_model, clusters_loaded, config, batch, names),
        "switching": static_system(people_model, people_loaded, config, 1, switch),
        "switching-grouped": static_system(people_model, people_loaded, config, batch, switch, grouped=True),
    }
    systems = {name: system for name, system in systems.items() if not config.only or name in config.only}
    for system in progress.track(list(systems.values()), "warming up"):
        system(jobs[:1], 0.0)
    results: dict[str, dict[str, list[dict[str, float]]]] = {}
    for _ in progress.track(range(config.repeats), "turns"):
        for mode, gap in (("at once", 0.0), ("staggered", config.gap)):
            for name, system in systems.items():
                figures = system(jobs, gap).figures()
                results.setdefault(mode, {}).setdefault(name, []).append(figures)
    for mode, found in results.items():
        print(f"\n{mode}:\n\n| system | tokens/s | of base | first token p50, p95 s | between tokens p50, p95 s |")
        print("|---|--:|--:|--:|--:|")
        for name, turns in found.items():
            middle = {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}
            share = ratio(turns, found["base"])
            streamed = middle["between_p95"] > 0
            between = f"{middle['between_p50']:.3f}, {middle['between_p95']:.3f}" if streamed else "not streamed"
            print(
                f"| {name} | {middle['tokens_per_second']:.1f} | {share:.2f} | {middle['first_p50']:.2f}, "
                f"{middle['first_p95']:.2f} | {between} |"
            )
        for other in {"one-by-one", "peft-batches", "switching", "switching-grouped"} & found.keys():
            print(f"card over {other}: {ratio(found['card'], found[other]):.2f}")
    curve = []
    for count in progress.track(config.concurrency, "curve"):
        point: dict[str, float] = {"concurrency": count}
        some = jobs[: max(count, 2)]
        for name, (loaded, rows, its_head) in {
            "base": (endless(base), None, None),
            "card": (all_linear, all_rows, head),
        }.items():
            timing = engine_system(loaded, rows, its_head, config, count)(some, 0.0)
            point[name] = timing.figures()["tokens_per_second"]
            point[f"{name}_between_p95"] = timing.figures()["between_p95"]
        curve.append(point)
    print("\n| concurrency | base tokens/s | CARD tokens/s | ratio |\n|--:|--:|--:|--:|")
    for point in curve:
        share = point["card"] / point["base"]
        print(f"| {point['concurrency']} | {point['base']:.1f} | {point['card']:.1f} | {share:.2f} |")
    kept = beside(config, all_linear, all_rows, jobs)
    print(f"\nrunning streams keep {kept['kept']:.3f} of their rate beside a new person's forward passes")
    path = Path(config.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"config": configs.to_dict(config), "torch": torch.__version__, "results": results}
    path.write_text(json.dumps({**content, "curve": curve, "beside": kept}, indent=2) + "\n")
    plot(curve, path.with_suffix(".png"))
    print(path)


def ratio(ours: Sequence[dict[str, float]], theirs: Sequence[dict[str, float]]) -> float:
    """Of tokens a second; the median over the turns."""
    return statistics.median(a["tokens_per_second"] / b["tokens_per_second"] for a, b in zip(ours, theirs, strict=True))


def plot(curve: Sequence[dict[str, float]], file: Path) -> None:
    """Tokens a second over the number of requests that decode together."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axis = figure.subplots()
    counts = [point["concurrency"] for point in curve]
    for name, label, color in (("base", "bare base model", "#5b7083"), ("card", "CARD", "#c2410c")):
        axis.plot(counts, [point[name] for point in curve], marker="o", color=color, label=label)
    axis.set_xscale("log", base=2)
    axis.set_xticks(counts, [str(int(count)) for count in counts])
    axis.set_xlabel("requests that decode together")
    axis.set_ylabel("tokens a second")
    axis.set_ylim(bottom=0)
    axis.grid(color="#e5e7eb")
    axis.legend(frameon=False)
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    main()
