"""How well a model predicts what people wrote: bits per token, pair accuracy, policy accuracy.

Scores only; the log-likelihoods come from a model elsewhere. Every function returns ``Scores`` for the bootstrap.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from palate.evaluation.statistics import Scores


def bits_per_token(
    nll_nats_N: ArrayLike, tokens_N: ArrayLike, questions: Sequence[str], users: Sequence[str]
) -> Scores:
    """Bits per token of held-out texts, weighted by tokens: a user's value is total bits over total tokens.

    Comparable only between models that share a tokenizer.

    Args:
        nll_nats_N: negative log-likelihood of each text, summed over its tokens, in nats.
        tokens_N: the number of tokens that were summed, at least one each.
    """
    tokens = np.asarray(tokens_N, dtype=np.float64)
    if not np.all(tokens >= 1):
        raise ValueError("every text needs at least one scored token: leave out texts without tokens")
    values = np.asarray(nll_nats_N, dtype=np.float64) / tokens / np.log(2.0)
    return Scores(tuple(questions), tuple(users), values, weights=tokens, unit="bits per token", higher_is_better=False)


def pair_accuracy(chosen_N: ArrayLike, rejected_N: ArrayLike, questions: Sequence[str], users: Sequence[str]) -> Scores:
    """Share of pairs in which the person's own text has the higher reward; a tie counts as half.

    Args:
        chosen_N: implicit reward of the person's own text.
        rejected_N: implicit reward of the other text under the same input.
        questions: a name per pair (not per question, when several pairs share one).
    """
    chosen, rejected = np.asarray(chosen_N, dtype=np.float64), np.asarray(rejected_N, dtype=np.float64)
    if chosen.shape != rejected.shape or chosen.ndim != 1:
        raise ValueError(f"pairs need two arrays of one length, found shapes {chosen.shape} and {rejected.shape}")
    values = np.where(chosen == rejected, 0.5, (chosen > rejected).astype(np.float64))
    # A comparison with nan is False, so without this it would silently count as lost.
    values[np.isnan(chosen) | np.isnan(rejected)] = np.nan
    return Scores(tuple(questions), tuple(users), values, chance=0.5)


def policy_accuracy(
    chosen_logprob_N: ArrayLike,
    rejected_logprob_N: ArrayLike,
    questions: Sequence[str],
    users: Sequence[str],
    *,
    chosen_tokens_N: ArrayLike | None = None,
    rejected_tokens_N: ArrayLike | None = None,
) -> Scores:
    """Share of pairs in which the decoding distribution itself gives the person's own text the higher probability.

    Unlike pair accuracy it includes the model that the reward corrects, so it says whether generation would change.
    With both token counts, log-probabilities per token are compared, so that the shorter text is not favoured.
    """
    if (chosen_tokens_N is None) != (rejected_tokens_N is None):
        raise ValueError("give the token counts of both sides or of none")
    chosen, rejected = np.asarray(chosen_logprob_N, dtype=float), np.asarray(rejected_logprob_N, dtype=float)
    if chosen_tokens_N is not None and rejected_tokens_N is not None:
        chosen, rejected = chosen / np.asarray(chosen_tokens_N), rejected / np.asarray(rejected_tokens_N)
    return pair_accuracy(chosen, rejected, questions, users)
