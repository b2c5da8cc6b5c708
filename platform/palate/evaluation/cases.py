"""Which questions an evaluation asks: of whom, and with which texts of other people beside the person's own."""

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from palate.card import pairs
from palate.corpora.schema import Item, Question, user_split

Users = Literal["development", "test", "all"]


@dataclass(frozen=True)
class Case:
    """One question with its gold, and texts of others that could answer it."""

    question: Question
    gold: str
    negatives: tuple[str, ...]


def select_cases(
    questions: Sequence[Question],
    items: Sequence[Item],
    clusters: Mapping[str, int],
    users: Users,
    *,
    negatives: int,
    max_users: int | None = None,
    max_questions: int | None = None,
    seed: int = 0,
) -> list[Case]:
    """The questions with a gold of the chosen people, each with up to ``negatives`` matched texts of other people.

    Args:
        items: all histories; matched texts are taken from them, never from golds.
        clusters: everybody's cluster; who has none cannot be asked.
        max_users: at most so many people, drawn by ``seed``.
        max_questions: at most so many questions a person, the first by id.

    Raises:
        ValueError: nothing is left.
    """
    by_person: dict[str, list[Question]] = {}
    for question in questions:
        chosen = users == "all" or user_split(question.user_id) == users
        if chosen and question.output is not None and question.user_id in clusters:
            by_person.setdefault(question.user_id, []).append(question)
    people = sample_people(sorted(by_person), max_users, seed)
    asked = [question for person in people for question in by_person[person][:max_questions]]
    if not asked:
        raise ValueError(
            f"--users {users} leaves no question with a known answer: the corpus has {len(questions)} questions of "
            f"{len({question.user_id for question in questions})} people; try --users all"
        )
    as_items = [Item(q.user_id, q.question_id, 0, q.source, q.input, q.output or "", q.date) for q in asked]
    matched = pairs.Bank(items, clusters).matched(as_items, negatives)
    return [
        Case(question, question.output or "", tuple(other.output for other in matched[question.question_id]))
        for question in asked
    ]


def sample_people(people: Collection[str], count: int | None, seed: int) -> list[str]:
    """At most ``count`` of the people, sorted; drawn by ``seed`` where there are more."""
    everybody = sorted(people)
    if count is None or count >= len(everybody):
        return everybody
    return sorted(random.Random(seed).sample(everybody, count))
