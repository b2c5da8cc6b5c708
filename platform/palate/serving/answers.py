"""Many answers at once by the decode engine, for stages and evaluations that have no server."""

from collections.abc import Sequence

from palate.card.adapters import RowMask
from palate.models.causal_lm import LoadedModel
from palate.serving.engine import Engine, Request

SLOTS = 16


def sample_answers(
    loaded: LoadedModel,
    rows: RowMask,
    prompts: Sequence[Sequence[int]],
    adapters: Sequence[int],
    *,
    temperature: float,
    top_p: float,
    seeds: Sequence[int],
    max_new_tokens: int,
) -> list[str]:
    """One answer a prompt, without personal correction: what the contrast stage calls the cluster model's answers."""
    if not prompts:
        return []
    requests = [
        Request(
            prompt,
            adapter=adapter,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
        )
        for prompt, adapter, seed in zip(prompts, adapters, seeds, strict=True)
    ]
    longest = max(map(len, prompts)) + max_new_tokens
    engine = Engine(loaded, rows, slots=min(SLOTS, len(requests)), max_length=longest)
    return [completion.text for completion in engine.generate(requests, label="cluster answers")]
