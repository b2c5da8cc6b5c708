"""An optional judge: a language model behind an OpenAI-compatible URL says which of two answers a person wrote.

Every pair is asked twice, with the order swapped, because judges favour a position. A pair counts 1 for the first
system if both answers name it, 0 if both name the other, and one half otherwise. Answers that name nobody are counted
and reported, never guessed.
"""

import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from palate.corpora.schema import Item, Question
from palate.evaluation.statistics import Scores
from palate.progress import track

API_KEY = "PALATE_JUDGE_API_KEY"

Verdict = Literal["A", "B", "tie"]

_PROMPT = """\
Here are texts that one person wrote:

{examples}

The same person was asked:

{question}

Two answers:

A: {a}

B: {b}

Which answer is more likely to be this person's own, judged by style? Reply with one word only: A, B or tie."""


@dataclass(frozen=True)
class Judge:
    """Where the judge is. ``parallel`` requests are under way at a time; the client itself retries failed ones."""

    url: str
    model: str
    parallel: int = 8
    timeout_s: float = 120.0


@dataclass(frozen=True)
class Judgement:
    """``scores`` holds the pairs whose two answers could be read; ``unread`` counts answers that could not."""

    scores: Scores
    asked: int
    unread: int
    swayed: int  # pairs whose verdict changed with the order

    @property
    def note(self) -> str:
        return (
            f"judge: {self.asked} answers to {self.asked // 2} pairs, {self.unread} named nobody (their pairs are left "
            f"out), {self.swayed} verdicts changed with the order"
        )

    def to_json(self) -> dict[str, Any]:
        """As JSON values, for ``from_json``."""
        verdicts = zip(self.scores.questions, self.scores.users, self.scores.values.tolist(), strict=True)
        return {
            "verdicts": [list(row) for row in verdicts],
            "asked": self.asked,
            "unread": self.unread,
            "swayed": self.swayed,
        }

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> "Judgement":
        """What ``to_json`` gave."""
        questions, users, points = (tuple(row[column] for row in values["verdicts"]) for column in range(3))
        scores = Scores(questions, users, np.array(points, dtype=np.float64), chance=0.5)
        return Judgement(scores, values["asked"], values["unread"], values["swayed"])


def compare(
    judge: Judge,
    questions: Sequence[Question],
    first: Mapping[str, str],
    second: Mapping[str, str],
    examples: Mapping[str, Sequence[Item]],
) -> Judgement:
    """Ask about every question which of two systems' answers is the person's.

    Args:
        first, second: answers by question id.
        examples: texts of the person to judge by, by user id.

    Raises:
        ValueError: the judge cannot be reached or refuses, naming the URL and model.
    """
    import openai

    client = openai.OpenAI(
        base_url=judge.url, api_key=os.environ.get(API_KEY, "none"), timeout=judge.timeout_s, max_retries=3
    )
    prompts = []
    for question in questions:
        a, b = first[question.question_id], second[question.question_id]
        prompts += [_prompt(question, x, y, examples[question.user_id]) for x, y in ((a, b), (b, a))]

    def ask(prompt: str) -> Verdict | None:
        reply = client.chat.completions.create(
            model=judge.model, messages=[{"role": "user", "content": prompt}], temperature=0.0, max_tokens=8
        )
        return parse(reply.choices[0].message.content or "")

    with ThreadPoolExecutor(judge.parallel) as pool:
        try:
            verdicts = list(track(pool.map(ask, prompts), "judging", len(prompts)))
        except openai.OpenAIError as error:
            pool.shutdown(cancel_futures=True)
            raise ValueError(
                f"the judge {judge.model} at {judge.url} did not answer: {error}. Check --judge-url, --judge-model and "
                f"the environment variable {API_KEY}"
            ) from error
    return _judgement(questions, verdicts)


def parse(reply: str) -> Verdict | None:
    """The verdict of a reply that says nothing else but perhaps "Answer:"; None if it cannot be told."""
    match = re.fullmatch(r"\W*(?:(?:final )?answer\W*(?:is)?\W*)?(A|B|tie)\W*", reply, flags=re.IGNORECASE)
    if match is None:
        return None
    return "tie" if match[1].lower() == "tie" else ("A" if match[1].upper() == "A" else "B")


def _judgement(questions: Sequence[Question], verdicts: Sequence[Verdict | None]) -> Judgement:
    points = {"A": 1.0, "tie": 0.5, "B": 0.0}
    kept, values, swayed = [], [], 0
    for question, straight, swapped in zip(questions, verdicts[::2], verdicts[1::2], strict=True):
        if straight is None or swapped is None:
            continue
        pair = (points[straight], 1 - points[swapped])
        swayed += pair[0] != pair[1]
        kept.append(question)
        values.append(pair[0] if pair[0] == pair[1] else 0.5)
    scores = Scores(
        tuple(question.question_id for question in kept),
        tuple(question.user_id for question in kept),
        np.array(values, dtype=np.float64),
        chance=0.5,
    )
    return Judgement(scores, len(verdicts), sum(verdict is None for verdict in verdicts), swayed)


def _prompt(question: Question, a: str, b: str, examples: Sequence[Item]) -> str:
    shown = "\n".join(f"- {item.output}" for item in examples)
    return _PROMPT.format(examples=shown, question=question.input, a=a, b=b)
