"""The one decode loop: rows of any users, adapters and strengths in one batch, joining and leaving between steps.

A request waits, its prompt is prefilled (short prompts of similar length together, a long one in chunks), then it
decodes a token a step until it ends. Decoding rows fill the first slots without a gap, so that a step costs what its
rows cost; a row that leaves is replaced by the last one. A prompt longer than a chunk is prefilled in the last slot.
Evaluation and contrast generation call ``generate``; a server calls ``submit``, ``step`` and ``cancel``, from one
thread. What a request gets depends on the request alone, not on its neighbours, up to rounding.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Literal

import torch
from torch import Tensor

from palate import progress
from palate.card.adapters import BASE, RowMask
from palate.card.correction import Head, correct
from palate.models.causal_lm import LoadedModel
from palate.serving.cache import SlotCache
from palate.serving.linear import favour_few_rows
from palate.serving.sampling import choose
from palate.serving.text import TextStream, decode

_LOOK_AHEAD = 64  # how far down the queue a prefill looks for prompts of similar length
_SIMILAR = 0.75  # the least ratio of lengths in one prefill: the padding it may waste
_ENOUGH = 4  # prompts that fill a pass well: more would gain little, and those that wait would wait longer


@dataclass(frozen=True)
class Request:
    """What to continue, for whom, and how.

    Attributes:
        adapter: the cluster's adapter, or ``BASE`` for the bare base model.
        vector_J: the person's vector; needed where ``beta``, the strength of the correction, is not 0.
        temperature: 0 decodes greedily.
        seed: of this request's own generator.
        stop: the answer ends before the first of these strings.
        top_log_probs: how many of the likeliest tokens are reported beside each chosen one.
        embeddings_Td: what the model reads at the T places of the prompt, where that is other than the embeddings of
            ``prompt_ids``, such as an image.
        barred: tokens that are never chosen.
    """

    prompt_ids: Sequence[int]
    adapter: int = BASE
    vector_J: Tensor | None = None
    beta: float = 0.0
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    top_log_probs: int = 0
    embeddings_Td: Tensor | None = None
    barred: tuple[int, ...] = ()


@dataclass(frozen=True)
class Completion:
    """A finished answer.

    Attributes:
        token_ids: every token that was chosen, with the end token, and with the tokens of a stop string, if met.
        text: the answer without special tokens, cut before the stop string.
        finish_reason: "stop" at an end token or stop string, "length" at ``max_new_tokens``, "error" where the model
            gave NaN or infinite values for this row (``generate`` raises then).
        log_probs: of each chosen token under the (corrected) model, before temperature and top-p.
    """

    token_ids: list[int]
    text: str
    finish_reason: Literal["stop", "length", "error"]
    log_probs: list[float]


@dataclass(frozen=True)
class Event:
    """One new token of one request. ``text`` is what a streamed answer can show more; the last event completes.

    ``top`` holds the likeliest tokens with their log-probabilities, best first, where the request asks for them.
    """

    id: int
    token_id: int
    log_prob: float
    text: str
    completion: Completion | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(eq=False)
class _Row:
    id: int
    request: Request
    generator: torch.Generator
    text: TextStream | None  # None: nobody asks for the text before the end
    length: int = 0  # tokens in the cache
    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)


class Engine:
    """Decodes on ``loaded``, whose model may be packed with adapters.

    Args:
        rows: of the packed model; None for a bare base model.
        head: the correction's head; None if no request has a ``beta``.
        slots: how many requests decode at a time.
        max_length: most tokens of a prompt and its answer together. The cache takes slots · max_length tokens.
        prefill_tokens: most prompt tokens in one forward pass, which is how long a prompt may hold up running rows.
        gather_steps: how many decode steps of running rows a prompt may wait for others to share its pass, for whoever
            calls ``step``: a pass over four short prompts takes little longer than one over a single prompt, and all
            running rows stand still for each. 0 prefills at once.

    Raises:
        ValueError: a model that the slot cache does not serve, or no memory for the cache.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        rows: RowMask | None = None,
        head: Head | None = None,
        *,
        slots: int,
        max_length: int,
        prefill_tokens: int = 512,
        gather_steps: int = 0,
    ) -> None:
        if slots < 1 or max_length < 2 or prefill_tokens < 1 or gather_steps < 0:
            raise ValueError(
                f"slots and prefill_tokens must be at least 1, max_length at least 2 and gather_steps at least 0, "
                f"found {slots}, {prefill_tokens}, {max_length} and {gather_steps}"
            )
        self._loaded, self._rows, self._head = loaded, rows, head
        self._model, self._device = loaded.model, loaded.device
        self._config = loaded.model.config.get_text_config()
        favour_few_rows(self._model)
        self._cache = SlotCache(self._config, slots, max_length, loaded.model.dtype, self._device)
        self._slots, self._max_length, self._prefill_tokens = slots, max_length, prefill_tokens
        self._gather_steps, self._gathered = gather_steps, 0  # most steps in a row that prompts are held back; so far
        self._ids = count()
        self._waiting: deque[_Row] = deque()
        self._prefilling: _Row | None = None
        self._decoding: list[_Row] = []  # row i is in slot i

    @property
    def slots(self) -> int:
        """How many requests decode at a time."""
        return self._slots

    @property
    def max_length(self) -> int:
        """Most tokens of a prompt and its answer together."""
        return self._max_length

    @property
    def idle(self) -> bool:
        """Whether no request waits or runs."""
        return not self._waiting and self._prefilling is None and not self._decoding

    def submit(self, request: Request, *, stream: bool = False) -> int:
        """Queue a request; its id. With ``stream`` its events carry the text as it grows.

        Raises:
            ValueError: it cannot be served, now or later; the message says why.
        """
        self._require_servable(request)
        text = TextStream(self._loaded.tokenizer, request.stop) if stream or request.stop else None
        row = _Row(next(self._ids), request, torch.Generator().manual_seed(request.seed), text)
        self._waiting.append(row)
        return row.id

    def cancel(self, id: int) -> bool:
        """Forget a request and free its slot at once; False if it was not waiting or running."""
        for slot, row in enumerate(self._decoding):
            if row.id == id:
                self._release(slot)
                return True
        if self._prefilling is not None and self._prefilling.id == id:
            self._cache.clear(self._slots - 1, self._prefilling.length)
            self._prefilling = None
            return True
        waiting = next((row for row in self._waiting if row.id == id), None)
        if waiting is not None:
            self._waiting.remove(waiting)
        return waiting is not None

    def step(self) -> list[Event]:
        """At most one prefill pass, then one token for each decoding row."""
        with torch.no_grad():
            return [*([] if self._gathers() else self._prefill()), *self._decode()]

    def generate(self, requests: Sequence[Request], label: str = "generate") -> list[Completion]:
        """The answers to any number of requests, in their order, with progress.

        Raises:
            ValueError: a request cannot be served (nothing is decoded then).
            RuntimeError: the engine is in use, or the model gave NaN or infinite values.
        """
        if not self.idle:
            raise RuntimeError("generate needs an idle engine; requests that were submitted before are still running")
        for request in requests:
            self._require_servable(request)
        # Longest first: neighbours in the queue have similar lengths, and no long row is left running alone at the end.
        order = sorted(range(len(requests)), key=lambda index: -len(requests[index].prompt_ids))
        place = {self.submit(requests[index]): index for index in order}
        completions: dict[int, Completion] = {}
        with torch.no_grad(), progress.meter(label, len(requests)) as bar:
            while not self.idle:
                events = []
                # Nobody waits for a next token here: fill the slots before decoding.
                while self._can_prefill():
                    events += self._prefill()
                events += self._decode()
                for event in events:
                    if event.completion is None:
                        continue
                    index = place[event.id]
                    if event.completion.finish_reason == "error":
                        self._waiting.clear()
                        self._prefilling, self._decoding = None, []
                        raise RuntimeError(
                            f"the model gave NaN or infinite logits for request {index}, at its token "
                            f"{len(event.completion.token_ids)}: look at adapter {requests[index].adapter} and, with "
                            f"beta {requests[index].beta}, at the vector"
                        )
                    completions[index] = event.completion
                    bar.update()
        return [completions[index] for index in range(len(requests))]

    def _require_servable(self, request: Request) -> None:
        ids, most = request.prompt_ids, request.max_new_tokens
        if not len(ids) or most < 1:
            raise ValueError(f"a request needs a prompt and max_new_tokens above 0, found {len(ids)} tokens and {most}")
        if len(ids) + most > self._max_length:
            raise ValueError(
                f"{len(ids)} prompt tokens and max_new_tokens {most} do not fit into the engine's max_length "
                f"{self._max_length}: shorten the prompt, lower max_new_tokens or raise max_length"
            )
        vocabulary = self._config.vocab_size
        if min(ids) < 0 or max(ids) >= vocabulary:
            raise ValueError(f"prompt tokens must lie in 0..{vocabulary - 1}, found {min(ids)}..{max(ids)}")
        adapters = 0 if self._rows is None else self._rows.count
        if not BASE <= request.adapter < adapters:
            raise ValueError(
                f"adapter must lie in {BASE}..{adapters - 1}, found {request.adapter}: the engine has no such"
            )
        if not (0 <= request.temperature < math.inf and 0 < request.top_p <= 1):
            raise ValueError(
                f"temperature must be at least 0 and top_p in (0, 1], found {request.temperature} and {request.top_p}"
            )
        if "" in request.stop:
            raise ValueError("a stop string is empty")
        if not 0 <= request.top_log_probs <= (most_top := vocabulary - len(request.barred)):
            raise ValueError(f"top_log_probs must lie in 0..{most_top}, found {request.top_log_probs}")
        expected = (len(ids), self._config.hidden_size)
        if request.embeddings_Td is not None and request.embeddings_Td.shape != expected:
            raise ValueError(
                f"a prompt of {len(ids)} tokens needs embeddings of shape {expected}, found "
                f"{tuple(request.embeddings_Td.shape)}"
            )
        self._require_correctable(request)

    def _require_correctable(self, request: Request) -> None:
        if request.beta == 0:
            return
        if not math.isfinite(request.beta):
            raise ValueError(f"beta must be finite, found {request.beta}")
        if self._head is None or request.vector_J is None:
            missing = "the engine a head" if self._head is None else "the request a vector"
            raise ValueError(
                f"beta {request.beta} asks for a correction, which needs {missing}; beta 0 decodes without"
            )
        if request.vector_J.shape != (self._head.width,):
            raise ValueError(
                f"the head needs a vector of shape ({self._head.width},), found {tuple(request.vector_J.shape)}: "
                f"it was fitted with another head"
            )

    def _can_prefill(self) -> bool:
        return self._prefilling is not None or (bool(self._waiting) and len(self._decoding) < self._slots)

    def _gathers(self) -> bool:
        """Whether the prompts that wait are held back for this step, so that later ones may share their pass."""
        free = self._slots - len(self._decoding)
        holds = (
            self._gathered < self._gather_steps
            and 0 < len(self._waiting) < min(_ENOUGH, free)
            and sum(len(row.request.prompt_ids) for row in self._waiting) < self._prefill_tokens
            and bool(self._decoding)
            and self._prefilling is None
        )
        self._gathered = self._gathered + 1 if holds else 0
        return holds

    def _prefill(self) -> list[Event]:
        """One forward pass over prompt tokens; the first tokens of the prompts that it finishes."""
        if not self._can_prefill():
            return []
        if self._prefilling is None:
            group = self._next_group()
            if len(group) > 1 or len(group[0].request.prompt_ids) <= self._prefill_tokens:
                return self._prefill_whole(group)
            self._prefilling = group[0]
        return self._prefill_chunk(self._prefilling)

    def _next_group(self) -> list[_Row]:
        """The first request in the queue, and others of similar length that fit into the same pass."""
        group = [self._waiting[0]]
        shortest = longest = len(group[0].request.prompt_ids)
        for row in islice(self._waiting, 1, _LOOK_AHEAD):
            low, high = min(shortest, len(row.request.prompt_ids)), max(longest, len(row.request.prompt_ids))
            if len(group) == self._slots - len(self._decoding):
                break
            if low >= _SIMILAR * high and high * (len(group) + 1) <= self._prefill_tokens:
                group.append(row)
                shortest, longest = low, high
        for row in group:
            self._waiting.remove(row)
        return group

    def _prefill_whole(self, group: list[_Row]) -> list[Event]:
        first, longest = len(self._decoding), max(len(row.request.prompt_ids) for row in group)
        tokens_BT = torch.zeros(len(group), longest, dtype=torch.long)
        for index, row in enumerate(group):
            row.length = len(row.request.prompt_ids)
            tokens_BT[index, : row.length] = torch.tensor(row.request.prompt_ids)
        # What is written beyond a shorter row's end is overwritten before anything attends to it.
        self._cache.prefill(slice(first, first + len(group)), 0)
        self._decoding += group
        ends_B = torch.tensor([row.length - 1 for row in group])
        embeddings_BTd = self._embeddings(group, tokens_BT, 0)
        positions_1T = torch.arange(longest)[None]
        return self._choose(first, *self._forward(group, tokens_BT, positions_1T, None, ends_B, embeddings_BTd))

    def _prefill_chunk(self, row: _Row) -> list[Event]:
        last, start = self._slots - 1, row.length
        tokens_T = torch.tensor(row.request.prompt_ids[start : start + self._prefill_tokens])
        row.length += len(tokens_T)
        positions_T = torch.arange(start, row.length)
        future_TL = torch.arange(row.length)[None] > positions_T[:, None]
        self._cache.prefill(slice(last, last + 1), start)
        ends_B = torch.tensor([len(tokens_T) - 1])
        embeddings_1Td = self._embeddings([row], tokens_T[None], start)
        output = self._forward([row], tokens_T[None], positions_T[None], future_TL[None, None], ends_B, embeddings_1Td)
        if row.length < len(row.request.prompt_ids):
            return []
        slot = len(self._decoding)
        if slot != last:
            self._cache.move(last, slot, row.length)
            self._cache.clear(last, row.length)
        self._prefilling = None
        self._decoding.append(row)
        return self._choose(slot, *output)

    def _decode(self) -> list[Event]:
        """One token for each decoding row."""
        rows = self._decoding
        if not rows:
            return []
        positions_B = torch.tensor([row.length for row in rows])
        longest = max(row.length for row in rows)
        future_BL = torch.arange(longest + 1)[None] > positions_B[:, None]
        self._cache.decode(len(rows), positions_B.to(self._device), longest)
        for row in rows:
            row.length += 1
        tokens_B = torch.tensor([row.token_ids[-1] for row in rows])
        ends_B = torch.zeros(len(rows), dtype=torch.long)
        output = self._forward(rows, tokens_B[:, None], positions_B[:, None], future_BL[:, None, None], ends_B)
        return self._choose(0, *output)

    def _embeddings(self, rows: list[_Row], tokens_BT: Tensor, start: int) -> Tensor | None:
        """What rows read from position ``start`` of their prompts on, (B, T, d); None: their tokens, all of them."""
        if all(row.request.embeddings_Td is None for row in rows):
            return None
        embeddings_BTd: Tensor = self._model.get_input_embeddings()(tokens_BT.to(self._device))
        for place, row in enumerate(rows):
            if row.request.embeddings_Td is not None:
                given_Td = row.request.embeddings_Td[start : start + tokens_BT.shape[1]]
                embeddings_BTd[place, : len(given_Td)] = given_Td.to(embeddings_BTd)
        return embeddings_BTd

    def _forward(
        self,
        rows: list[_Row],
        tokens_BT: Tensor,
        positions_BT: Tensor,
        future_B1TL: Tensor | None,
        ends_B: Tensor,
        embeddings_BTd: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Logits (B, V), and the hidden states (B, d) that the head needs, at position ``ends_B`` of each row.

        ``future_B1TL`` is true where a token must not attend; None is a causal pass over whole prompts. With
        ``embeddings_BTd`` the model reads these in the place of the tokens.
        """
        if self._rows is not None:
            self._rows.set(torch.tensor([row.request.adapter for row in rows], device=self._device))
        mask_B1TL = None
        if future_B1TL is not None:
            zeros = torch.zeros(future_B1TL.shape, dtype=self._model.dtype)
            mask_B1TL = zeros.masked_fill_(future_B1TL, torch.finfo(zeros.dtype).min).to(self._device)
        batch_B = torch.arange(len(rows), device=self._device)
        ends_B = ends_B.to(self._device)
        layers = self._head.features.layers if self._head and any(row.request.beta for row in rows) else ()
        # Logits at the rows' ends only; `logits_to_keep` cannot say that in every transformers version we support.
        hook = self._model.get_output_embeddings().register_forward_pre_hook(
            lambda module, inputs: (inputs[0][batch_B, ends_B, None],)
        )
        try:
            # By position: transformers 5.24 renamed `past_key_values` to `cache`.
            output = self._model(
                tokens_BT.to(self._device) if embeddings_BTd is None else None,
                mask_B1TL,
                positions_BT.to(self._device),
                self._cache,
                inputs_embeds=embeddings_BTd,
                use_cache=True,
                output_hidden_states=bool(layers),
            )
        finally:
            hook.remove()
        return output.logits[:, 0], [output.hidden_states[layer][batch_B, ends_B] for layer in layers]

    def _choose(self, first: int, logits_BV: Tensor, hidden_states: list[Tensor]) -> list[Event]:
        """Correct, choose the next token of the rows from slot ``first`` on, and end those that are done."""
        rows = self._decoding[first : first + len(logits_BV)]
        requests = [row.request for row in rows]
        if hidden_states and self._head is not None:
            zero_J = torch.zeros(self._head.width)
            vectors = [zero_J if request.vector_J is None else request.vector_J.float() for request in requests]
            betas_B = torch.tensor([request.beta for request in requests], device=self._device)
            vectors_BJ = torch.stack(vectors).to(self._device)
            logits_BV = correct(logits_BV, hidden_states, vectors_BJ, betas_B, self._head)
        for place, request in enumerate(requests):
            if request.barred:
                logits_BV[place, list(request.barred)] = -math.inf
        # One number a token for whoever draws, so that a row's numbers do not depend on the batch.
        uniforms_B = torch.cat([_uniform(row) for row in rows])
        temperatures, top_ps = [r.temperature for r in requests], [r.top_p for r in requests]
        tokens_B = choose(logits_BV, temperatures, top_ps, uniforms_B)
        totals_B = logits_BV.float().logsumexp(dim=1)
        log_probs_B = logits_BV.gather(1, tokens_B[:, None]).squeeze(1).float() - totals_B
        tops = _likeliest(logits_BV, totals_B, [request.top_log_probs for request in requests])
        chosen = zip(rows, tokens_B.tolist(), log_probs_B.tolist(), tops, strict=True)
        events = [self._record(row, token_id, log_prob, top) for row, token_id, log_prob, top in chosen]
        # From the last slot on, so that no row is moved that ends as well.
        for slot in range(first + len(rows) - 1, first - 1, -1):
            completion = events[slot - first].completion
            if completion is not None:
                if completion.finish_reason == "error":
                    self._cache.clear(slot, self._decoding[slot].length)
                self._release(slot)
        return events

    def _record(self, row: _Row, token_id: int, log_prob: float, top: tuple[tuple[int, float], ...]) -> Event:
        request, tokenizer = row.request, self._loaded.tokenizer
        row.token_ids.append(token_id)
        row.log_probs.append(log_prob)
        ended = token_id in self._loaded.eos_ids
        if row.text is not None and not ended:
            row.text.push(token_id)
            ended = row.text.stopped
        reason: Literal["stop", "length", "error"] | None = None
        if not math.isfinite(log_prob):
            reason = "error"
        elif ended:
            reason = "stop"
        elif len(row.token_ids) == request.max_new_tokens:
            reason = "length"
        if reason is None:
            return Event(row.id, token_id, log_prob, row.text.take() if row.text else "", None, top)
        text, rest = row.text.finish(row.token_ids) if row.text else (decode(tokenizer, row.token_ids), "")
        return Event(row.id, token_id, log_prob, rest, Completion(row.token_ids, text, reason, row.log_probs), top)

    def _release(self, slot: int) -> None:
        """Free a decoding row's slot; the last row takes its place."""
        last = self._decoding.pop()
        if slot < len(self._decoding):
            self._cache.move(len(self._decoding), slot, last.length)
            self._decoding[slot] = last


def _uniform(row: _Row) -> Tensor:
    if row.request.temperature == 0:
        return torch.zeros(1, dtype=torch.float64)
    return torch.rand(1, dtype=torch.float64, generator=row.generator)


def _likeliest(logits_BV: Tensor, totals_B: Tensor, counts: Sequence[int]) -> list[tuple[tuple[int, float], ...]]:
    """The ``counts`` likeliest tokens of each row with their log-probabilities, best first."""
    most = max(counts)
    if not most:
        return [()] * len(counts)
    values_Bk, tokens_Bk = logits_BV.float().topk(most, dim=1)
    log_probs_Bk = values_Bk - totals_B[:, None]
    rows = zip(tokens_Bk.tolist(), log_probs_Bk.tolist(), counts, strict=True)
    return [tuple(zip(tokens[:count], log_probs[:count], strict=True)) for tokens, log_probs, count in rows]
