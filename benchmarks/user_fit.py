"""Fitting user vectors from cached features: Palate's solver beside the obvious ones, in one run.

    python benchmarks/user_fit.py

Each of ``--users`` people has ``--texts`` texts of ``--positions`` tokens. Features and candidates are drawn, not
computed by a model: rank-frequency logits whose entropies range from near 0 to about 5 nats a token, a random tied
head, and written tokens that follow a true vector from the prior. People are drawn and fitted in groups, and after
each group the first person of it is fitted by the alternatives too: scipy's L-BFGS-B and torch's LBFGS with strong
Wolfe line search, both on the objective by automatic differentiation, to the same norm of the gradient, all three on
one thread. All take turns, so that a machine shared with others slows all of them alike; ratios are medians over the
turns. ``cpu`` counts the process's own time, which other programs inflate less than waiting time.

With ``--model`` it goes on, end to end, for one new person of as many texts: the forward pass over them, the fit, and
beside them a LoRA of their own, trained on the same texts by Palate's loop with the defaults of ``jobs/card.py``.
"""

import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.optimize
import torch
import tyro
from torch import Tensor

from palate.card import adaptation, features, fitting
from palate.card.correction import FeatureMap, Head, candidate_rows
from palate.card.preferences import ABSENT, Positions, Prior, log_ratios, normalizer
from palate.models.causal_lm import load_causal_lm
from palate.training.parallel import World


@dataclass(frozen=True)
class Config:
    """What to measure; see the module's text."""

    users: int = 1000
    texts: int = 20
    positions: int = 12
    features: int = 576
    width: int = 128
    top_k: int = 50
    vocabulary: int = 49152
    tolerance: float = 1e-5
    group: int = 20
    threads: int = 2
    seed: int = 0
    model: str | None = None
    prompt_tokens: int = 64
    out: Path = Path("benchmarks/out/user_fit.json")


def make_head(config: Config) -> Head:
    generator = torch.Generator().manual_seed(config.seed)
    d, width = config.features, config.width
    identity = FeatureMap((1,), torch.zeros(1, d), torch.ones(1, d), torch.eye(d))
    embeddings_Vd = torch.randn(config.vocabulary, d, generator=generator) / d**0.5
    output_VJ = embeddings_Vd @ torch.randn(d, width, generator=generator) / width**0.5
    return Head(identity, torch.randn(d, width, generator=generator) / d**0.5, output_VJ, config.top_k)


def make_person(config: Config, head: Head, prior: Prior, number: int) -> Positions:
    """Positions whose written tokens are drawn from the person's own corrected distribution."""
    generator = torch.Generator().manual_seed(config.seed + 1 + number)
    count, tail = config.texts * config.positions, 2000
    features_Nd = torch.randn(count, config.features, generator=generator)
    steepness = 0.8 + 2.2 * torch.rand(count, 1, generator=generator)
    logits = -steepness * torch.arange(1, tail + 1).log() + 0.3 * torch.randn(count, tail, generator=generator)
    log_probs_Nk, order = logits.log_softmax(-1).topk(config.top_k, dim=-1)
    candidates_Nk = torch.randint(0, config.vocabulary, (count, tail), generator=generator).gather(1, order)
    vector_J = prior.mean_J + torch.randn(config.width, generator=generator) / prior.precision_J.sqrt()
    delta_Nk = candidate_rows(head, features_Nd, candidates_Nk) @ vector_J
    _, own_Nk = normalizer(delta_Nk, log_probs_Nk)
    choices = torch.cat([own_Nk, (1 - own_Nk.sum(1, keepdim=True)).clamp(min=0)], dim=1)
    target_N = torch.multinomial(choices, 1, generator=generator).squeeze(1)
    target_N = torch.where(target_N == config.top_k, ABSENT, target_N)
    target_log_prob_N = log_probs_Nk.gather(1, target_N.clamp(min=0)[:, None]).squeeze(1)
    text_N = torch.arange(count) // config.positions
    return Positions(features_Nd, candidates_Nk, log_probs_Nk, target_N, target_log_prob_N, text_N)


def objective(person: Positions, head: Head, prior: Prior, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The negative log posterior as a differentiable function of a vector in float64."""
    phi_NkJ = candidate_rows(head, person.features_Nd, person.candidates_Nk).to(dtype)
    log_probs_Nk, mean_J, precision_J = person.log_probs_Nk.to(dtype), prior.mean_J.double(), prior.precision_J.double()

    def value(vector_J: Tensor) -> Tensor:
        ratios_N = log_ratios(phi_NkJ @ vector_J.to(dtype), log_probs_Nk, person.target_N)
        return 0.5 * (precision_J * (vector_J - mean_J).square()).sum() - ratios_N.sum(dtype=torch.float64)

    return value


def by_scipy(person: Positions, head: Head, prior: Prior, tolerance: float) -> Tensor:
    value = objective(person, head, prior, torch.float32)

    def with_gradient(vector: np.ndarray) -> tuple[float, np.ndarray]:
        vector_J = torch.from_numpy(vector).requires_grad_()
        result = value(vector_J)
        (gradient_J,) = torch.autograd.grad(result, vector_J)
        return float(result), gradient_J.numpy()

    # scipy tests the largest element of the gradient: for the norm it must be smaller by the square root of J.
    options = {"gtol": tolerance / len(prior.mean_J) ** 0.5, "ftol": 0.0, "maxiter": 1000, "maxcor": 10}
    start = prior.mean_J.double().numpy()
    return torch.from_numpy(
        scipy.optimize.minimize(with_gradient, start, jac=True, method="L-BFGS-B", options=options).x
    )


def by_torch(person: Positions, head: Head, prior: Prior, tolerance: float) -> Tensor:
    value = objective(person, head, prior, torch.float32)
    vector_J = prior.mean_J.double().clone().requires_grad_()
    solver = torch.optim.LBFGS(
        [vector_J],
        max_iter=1000,
        history_size=10,
        tolerance_grad=tolerance / len(prior.mean_J) ** 0.5,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        solver.zero_grad()
        result = value(vector_J)
        result.backward()
        return result

    solver.step(closure)
    return vector_J.detach()


def by_palate(person: Positions, head: Head, prior: Prior, tolerance: float) -> Tensor:
    return fitting.fit_vector(person, head, prior, tolerance=tolerance).vector_J.double()


def timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """What ``work`` returns, its wall time and its processor time in seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def measure(config: Config) -> dict[str, Any]:
    torch.set_num_threads(config.threads)
    head = make_head(config)
    prior = Prior(torch.zeros(config.width), torch.ones(config.width))
    solvers = {"palate": by_palate, "scipy L-BFGS-B": by_scipy, "torch LBFGS": by_torch}
    walls: dict[str, list[float]] = {name: [] for name in solvers}
    cpus: dict[str, list[float]] = {name: [] for name in solvers}
    worse: dict[str, list[float]] = {name: [] for name in solvers}
    gradients: dict[str, list[float]] = {name: [] for name in solvers}
    total_wall = total_cpu = 0.0
    fits: list[fitting.Fit] = []
    fitting.fit_vectors([make_person(config, head, prior, 0)], head, prior)  # allocations and threads
    for start in range(0, config.users, config.group):
        torch.set_num_threads(config.threads)
        people = [make_person(config, head, prior, n) for n in range(start, min(start + config.group, config.users))]
        found, wall, cpu = timed(lambda people=people: fitting.fit_vectors(people, head, prior))
        fits, total_wall, total_cpu = fits + found, total_wall + wall, total_cpu + cpu
        torch.set_num_threads(1)
        exact, values = objective(people[0], head, prior, torch.float64), {}
        for name, solve in solvers.items():
            answer, wall, cpu = timed(lambda s=solve, p=people[0]: s(p, head, prior, config.tolerance))
            walls[name].append(wall)
            cpus[name].append(cpu)
            vector_J = answer.requires_grad_()
            values[name] = exact(vector_J)
            gradients[name].append(float(torch.autograd.grad(values[name], vector_J)[0].norm()))
        for name, value in values.items():
            worse[name].append(float(value - min(values.values())))
        print(f"{len(fits):5d} of {config.users}: {total_wall:.1f} s, {total_cpu:.1f} s of processor time", flush=True)
    return {
        "config": {**asdict(config), "out": str(config.out)},
        "machine": {"processor": platform.processor() or platform.machine(), "torch": torch.__version__},
        "seconds": {"wall": total_wall, "cpu": total_cpu},
        "iterations": statistics.mean(fit.iterations for fit in fits),
        "largest_gradient_norm": max(fit.gradient_norm for fit in fits),
        "solvers": {
            name: {
                "people": len(walls[name]),
                "wall_ms": 1e3 * statistics.median(walls[name]),
                "wall_ms_best": 1e3 * min(walls[name]),
                "cpu_ms": 1e3 * statistics.median(cpus[name]),
                "wall_ratio": statistics.median(w / p for w, p in zip(walls[name], walls["palate"], strict=True)),
                "cpu_ratio": statistics.median(c / p for c, p in zip(cpus[name], cpus["palate"], strict=True)),
                "float64_gradient_norm": statistics.median(gradients[name]),
                "objective_above_best": max(worse[name]),
            }
            for name in solvers
        },
    }


def end_to_end(config: Config, name: str) -> dict[str, Any]:
    """Seconds, (wall, processor), of each part of what a new person costs; the texts are random tokens."""
    torch.set_num_threads(config.threads)
    loaded = load_causal_lm(name)
    vocabulary, width, layers = (loaded.fingerprint[key] for key in ("vocab_size", "hidden_size", "layers"))
    generator = torch.Generator().manual_seed(config.seed)

    def tokens(count: int) -> list[int]:
        return torch.randint(0, vocabulary, (count,), generator=generator).tolist()

    texts = [(tokens(config.prompt_tokens), tokens(config.positions)) for _ in range(config.texts)]
    used = tuple(round(layers * share) for share in (0.25, 0.5, 0.75, 1.0))
    feature_map = FeatureMap(used, torch.zeros(len(used), width), torch.ones(len(used), width), torch.eye(width))
    embeddings_Vd = loaded.model.get_output_embeddings().weight.detach()
    mixing_dJ = torch.randn(width, config.width, generator=generator) / width**0.5
    project_dJ = torch.randn(width, config.width, generator=generator) / width**0.5 / 10
    head = Head(feature_map, project_dJ, embeddings_Vd @ mixing_dJ, config.top_k)
    prior = Prior(torch.zeros(config.width), torch.ones(config.width))
    branches = [features.Branches(prompt, [answer], -1) for prompt, answer in texts]
    features.extract(loaded, None, feature_map, branches[:2], config.top_k)  # allocations and threads
    positions, *forward = timed(lambda: features.extract(loaded, None, feature_map, branches, config.top_k))
    fit, *fitted = timed(lambda: fitting.fit_vector(positions, head, prior, tolerance=config.tolerance))
    samples = [adaptation.Sample(prompt, answer, 0) for prompt, answer in texts]
    ids = [str(number) for number in range(len(samples))]
    settings = adaptation.AdaptConfig(checkpoint_every=10**6)
    with tempfile.TemporaryDirectory() as folder:
        (_, summary), *trained = timed(
            lambda: adaptation.train_adapters(loaded, 1, samples, ids, settings, f"{folder}/run", World())
        )
    return {
        "model": name,
        "forward": forward,
        "fit": fitted,
        "lora": trained,
        "lora_steps": summary.steps,
        "gradient_norm": fit.gradient_norm,
        "ratio_wall": trained[0] / (forward[0] + fitted[0]),
        "ratio_cpu": trained[1] / (forward[1] + fitted[1]),
        "ratio_cpu_fit_alone": trained[1] / fitted[1],
    }


def table(result: dict[str, Any]) -> str:
    lines = [
        "| solver | wall ms | best | cpu ms | wall ratio | cpu ratio | gradient in float64 | objective above best |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in result["solvers"].items():
        lines.append(
            f"| {name} | {row['wall_ms']:.1f} | {row['wall_ms_best']:.1f} | {row['cpu_ms']:.1f} | "
            f"{row['wall_ratio']:.1f} | {row['cpu_ratio']:.1f} | {row['float64_gradient_norm']:.1e} | "
            f"{row['objective_above_best']:.1e} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    config = tyro.cli(Config, description=__doc__)
    result = measure(config)
    if config.model:
        result["end_to_end"] = end_to_end(config, config.model)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.write_text(json.dumps(result, indent=2) + "\n")
    print(table(result))
    print(
        f"{config.users} people of {config.texts} texts: {result['seconds']['wall']:.1f} s, "
        f"{result['seconds']['cpu']:.1f} s of processor time, {result['iterations']:.1f} steps each, largest gradient "
        f"norm {result['largest_gradient_norm']:.1e}"
    )
    if config.model:
        whole = result["end_to_end"]
        print("| part | wall s | cpu s |\n|---|---|---|")
        for part in ("forward", "fit", "lora"):
            print(f"| {part} | {whole[part][0]:.3f} | {whole[part][1]:.3f} |")
        print(
            f"their own LoRA, {whole['lora_steps']} steps, takes {whole['ratio_cpu']:.1f} times the processor time "
            f"of forward pass and fit, {whole['ratio_cpu_fit_alone']:.0f} times that of the fit from cached features"
        )
