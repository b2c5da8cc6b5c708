"""A small random head and random positions for it, for the tests of the user vector."""

import torch

from palate.card import preferences
from palate.card.correction import FeatureMap, Head

VOCABULARY, WIDTH, FEATURES, TOP_K = 40, 6, 10, 8


def make_head(seed: int = 0) -> Head:
    generator = torch.Generator().manual_seed(seed)
    features = FeatureMap((1,), torch.zeros(1, FEATURES), torch.ones(1, FEATURES), torch.eye(FEATURES))
    project = torch.randn(FEATURES, WIDTH, generator=generator) / FEATURES**0.5
    return Head(features, project, torch.randn(VOCABULARY, WIDTH, generator=generator), TOP_K)


def make_positions(count: int, seed: int = 1) -> tuple[preferences.Positions, torch.Tensor, torch.Tensor]:
    """Positions, with the full logits (N, V) and written tokens (N,) that they came from."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, VOCABULARY, generator=generator) * 2
    tokens = torch.randint(0, VOCABULARY, (count,), generator=generator)
    log_probs, candidates = logits.log_softmax(-1).topk(TOP_K, dim=-1)
    found = candidates == tokens[:, None]
    target = torch.where(found.any(1), found.int().argmax(1), preferences.ABSENT)
    positions = preferences.Positions(
        features_Nd=torch.randn(count, FEATURES, generator=generator),
        candidates_Nk=candidates,
        log_probs_Nk=log_probs,
        target_N=target,
        target_log_prob_N=logits.log_softmax(-1).gather(1, tokens[:, None]).squeeze(1),
        text_N=torch.arange(count) // 5,
    )
    return positions, logits, tokens
