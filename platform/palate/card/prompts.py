"""Prompts: the person's own history as context, and the one way every stage turns a request into token ids.

Training, features, decoding and evaluation all call ``prompt_ids``, so that their prompts cannot drift apart. Items
are found by BM25 over one person's history and quoted as LaMP's official code does (spec c.3, "Prompt building"):
``Task.title_template`` around each item, joined by ", and ", put before the instruction.

Ranking is Lucene's BM25 (``bm25s``, k1 = 1.5, b = 0.75) on white-space tokens, neither lower-cased nor stemmed. The
official code's ``rank_bm25.BM25Okapi`` differs in the inverse document frequency only: ln((D - df + 0.5) / (df + 0.5)),
floored for words in more than half of the items, against Lucene's ln(1 + the same ratio). Equal scores go to the more
recent item, as there.
"""

import logging
from collections.abc import Collection, Iterable, Sequence

import bm25s
import numpy as np

from palate.corpora.schema import Item, Question, Task
from palate.models.causal_lm import LoadedModel, render_prompt

logging.getLogger("bm25s").setLevel(logging.WARNING)  # it asks for DEBUG, and says a line for every index built

INPUT_SHARE = 0.6  # of the token budget is the request's before history items get any
JOINT = ", and "

# How the quoted items and the request make one prompt, where it is not "{items}. {input}". LaMP-1 lists the person's
# own titles inside the request, after the word "title".
_AFTER_PATTERNS = "{items}. Following the given patterns {input}"
_WHOLES = {
    "LaMP_1": "{input_to_title}, and {items}{input_after_title}",
    "LaMP_5": _AFTER_PATTERNS,
    "LaMP_7": "{items} are written by a person. Following the given patterns {input}",
}

# Tasks whose official search looks at what was written about only; all others: the person's text and the source.
_SEARCHED_BY_SOURCE = {"LaMP_2", "LaMP_2M", "LaMP_3", "LaMP_6"}


class Retriever:
    """BM25 over one person's items; the index is built once and serves any number of queries."""

    def __init__(self, task: Task, items: Sequence[Item]) -> None:
        """Index ``items``, which may come in any order but must all be one person's.

        Raises:
            ValueError: the items are of several people.
        """
        if len(people := sorted({item.user_id for item in items})) > 1:
            raise ValueError(f"a Retriever looks into one person's history, found items of {people[:5]}")
        self.items = sorted(items, key=lambda item: item.order)
        self._orders = np.array([item.order for item in self.items], dtype=np.int64)
        self._rows = {item.item_id: row for row, item in enumerate(self.items)}
        documents = [searched_text(task, item).split() for item in self.items]
        self._index = bm25s.BM25() if any(documents) else None
        if self._index is not None:
            self._index.index(documents, show_progress=False)

    def retrieve(
        self, query: str, k: int, *, before: int | None = None, allowed: Collection[str] | None = None
    ) -> list[Item]:
        """The at most ``k`` items that match ``query`` best, best first; equal scores: the most recent first.

        Args:
            query: the source of what is asked (the article, the abstract), not the instruction around it.
            before: only items whose order is smaller.
            allowed: only items with these ids.

        Raises:
            ValueError: ``k`` is negative, or ``allowed`` names an item that is not here.
        """
        if k < 0:
            raise ValueError(f"--history-k is the number of items to retrieve, found {k}: use 0 or more")
        rows = np.arange(len(self.items))
        if allowed is not None:
            if absent := sorted(set(allowed) - self._rows.keys()):
                raise ValueError(
                    f"item {absent[0]!r} is in a profile, but not among this person's items: prepare the corpus again"
                )
            rows = np.array(sorted(self._rows[item_id] for item_id in set(allowed)), dtype=np.int64)
        if before is not None:
            rows = rows[self._orders[rows] < before]
        if k == 0 or rows.size == 0:
            return []
        # Best last, equal scores in order of time: reversed, the most recent of equals comes first.
        ranked = rows[np.argsort(self._scores(query)[rows], kind="stable")][::-1]
        return [self.items[row] for row in ranked[:k]]

    def for_item(self, item: Item, k: int) -> list[Item]:
        """What the prompt of a history item may quote: what the person wrote before it."""
        return self.retrieve(item.source, k, before=item.order)

    def for_question(self, question: Question, k: int) -> list[Item]:
        """What the prompt of a question may quote: the items of its profile."""
        return self.retrieve(question.source, k, allowed=question.profile)

    def _scores(self, query: str) -> np.ndarray:
        words = query.split()
        if self._index is None or not any(word in self._index.vocab_dict for word in words):
            return np.zeros(len(self.items))
        return self._index.get_scores(words)


def retrievers(task: Task, items: Iterable[Item]) -> dict[str, Retriever]:
    """One retriever a person, by user id."""
    histories: dict[str, list[Item]] = {}
    for item in items:
        histories.setdefault(item.user_id, []).append(item)
    return {user: Retriever(task, history) for user, history in histories.items()}


def searched_text(task: Task, item: Item) -> str:
    """The text of an item that BM25 sees."""
    return item.source if task.name in _SEARCHED_BY_SOURCE else f"{item.output} {item.source}"


def history_prompt(task: Task, question_input: str, items: Sequence[Item]) -> str:
    """The request with the retrieved items quoted before it, uncut; without items the request itself."""
    return _assemble(task, question_input, [_quote(task, item) for item in items])


def prompt_ids(
    loaded: LoadedModel, task: Task, text: str, history: Sequence[Item], max_prompt_tokens: int
) -> list[int]:
    """Token ids of a prompt, at most ``max_prompt_tokens`` with the chat template's own.

    Where the whole does not fit, LaMP's split holds: the request keeps min(its length, 0.6 of the room), the rest is
    shared equally by the items, and what one leaves unused goes to the next. An item's longest field is cut at a token
    boundary; an item without room for any of it is left out. What the items leave is the request's, cut at its end.

    Args:
        text: ``input`` of a question or item: the instruction with the source at its end.
        history: retrieved items, best first (``Retriever``); empty for a prompt without history.

    Raises:
        ValueError: not even an empty request fits.
    """
    ids = render_prompt(loaded, history_prompt(task, text, history))
    if len(ids) <= max_prompt_tokens:
        return ids
    room = max_prompt_tokens - len(render_prompt(loaded, ""))
    if room <= 0:
        raise ValueError(
            f"--max-prompt-tokens {max_prompt_tokens} leaves no room: the chat template of {loaded.name} alone "
            f"takes {max_prompt_tokens - room} tokens"
        )
    size = _count(loaded, text)
    quotes = _fitted_quotes(loaded, task, history, room - min(size, int(INPUT_SHARE * room)))
    limit = room - (_count(loaded, _assemble(task, "", quotes)) if quotes else 0)
    # Token counts of parts need not add up to the count of the whole, so the request gives way until the whole fits.
    while True:
        ids = render_prompt(loaded, _assemble(task, _cut(loaded, text, limit), quotes))
        if (excess := len(ids) - max_prompt_tokens) <= 0:
            return ids
        if limit <= 0:
            quotes, limit = quotes[:-1], size
        else:
            limit = max(0, min(limit, size) - excess)


def _fitted_quotes(loaded: LoadedModel, task: Task, items: Sequence[Item], allowance: int) -> list[str]:
    """The quoted items, cut so that together with what joins them they take about ``allowance`` tokens."""
    if not items:
        return []
    frame = _count(loaded, _assemble(task, "", [""])) + _count(loaded, JOINT) * (len(items) - 1)
    share = (allowance - frame) // len(items)
    cut_field = "source" if "{source}" in task.title_template else "output"
    quotes, saved = [], 0
    for item in items:
        room = share + saved
        quote = _quote(task, item)
        if _count(loaded, quote) > room:
            text = item.source if cut_field == "source" else item.output
            kept = _cut(loaded, text, room - _count(loaded, _quote(task, item, **{cut_field: ""})))
            quote = _quote(task, item, **{cut_field: kept}) if kept else ""
        if quote:
            quotes.append(quote)
        saved = room - _count(loaded, quote)
    return quotes


def _quote(task: Task, item: Item, source: str | None = None, output: str | None = None) -> str:
    return task.title_template.format(
        source=item.source if source is None else source, output=item.output if output is None else output
    )


def _assemble(task: Task, text: str, quotes: Sequence[str]) -> str:
    if not quotes:
        return text
    before, title, after = text.partition("title")
    return _WHOLES.get(task.name, "{items}. {input}").format(
        items=JOINT.join(quotes), input=text, input_to_title=before + title, input_after_title=after
    )


def _count(loaded: LoadedModel, text: str) -> int:
    return len(loaded.plain_tokenizer(text, add_special_tokens=False).input_ids)


def _cut(loaded: LoadedModel, text: str, limit: int) -> str:
    """The beginning of ``text`` that its first ``limit`` tokens cover; never a part of a character."""
    if limit <= 0:
        return ""
    offsets = loaded.plain_tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    return text if len(offsets) <= limit else text[: offsets[limit][0]]
