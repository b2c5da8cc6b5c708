"""Does a generated text read as written by its person? A classifier of authors says so.

Character n-grams and a linear classifier, the usual strong baseline of authorship attribution (Stamatatos, A Survey of
Modern Authorship Attribution Methods, 2009). It learns from what people wrote, never from texts that are scored. Topic
also gives authors away, and all systems are asked about the same topics: read differences between systems, and beside
them the score of the people's own answers, which is the ceiling.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from palate.corpora.schema import Item, normalized
from palate.evaluation.statistics import Scores

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

NGRAMS = (1, 4)
MAX_FEATURES = 100_000


@dataclass(frozen=True)
class Classifier:
    """A trained classifier of authors; column u of its decisions belongs to ``users[u]``."""

    users: tuple[str, ...]
    texts: int
    pipeline: "Pipeline"

    def decisions(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """(N, U) signed distances, the greater the more like that person."""
        found = self.pipeline.decision_function(list(texts))
        # For two classes scikit-learn gives one column, positive for the second.
        return np.stack([-found, found], axis=1) if found.ndim == 1 else found


def train(items: Iterable[Item], scored_texts: Iterable[str], seed: int = 0) -> Classifier:
    """A classifier of the people who wrote ``items``, from those of their texts that are not among ``scored_texts``.

    Args:
        scored_texts: what will be scored, such as golds and generated texts; equal texts (up to case and white
            space) are left out of training.

    Raises:
        ValueError: fewer than two people are left to tell apart.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_pipeline
    from sklearn.svm import LinearSVC

    unseen = {normalized(text) for text in scored_texts}
    known = [item for item in items if normalized(item.output) and normalized(item.output) not in unseen]
    users = tuple(sorted({item.user_id for item in known}))
    if len(users) < 2:
        raise ValueError(f"an authorship classifier needs texts of at least two people, found {len(users)}")
    pipeline = make_pipeline(
        TfidfVectorizer(
            analyzer="char", ngram_range=NGRAMS, lowercase=False, sublinear_tf=True, max_features=MAX_FEATURES
        ),
        LinearSVC(class_weight="balanced", random_state=seed),
    )
    pipeline.fit([item.output for item in known], [item.user_id for item in known])
    return Classifier(users, len(known), pipeline)


def score(classifier: Classifier, texts: Mapping[str, str], users: Mapping[str, str]) -> dict[str, Scores]:
    """How well texts are recognized as their person's, by question id.

    Returns:
        "authorship": share of texts whose most likely author is the person (chance 1 / U);
        "authorship rank": share of the other people that are less likely than the person (chance 0.5).
        Questions of people whom the classifier does not know are left out of both.
    """
    column = {user: index for index, user in enumerate(classifier.users)}
    questions = tuple(sorted(question for question in texts if users[question] in column))
    if not questions:
        raise ValueError("none of the texts is by a person whom the authorship classifier has learned")
    people = tuple(users[question] for question in questions)
    decisions_NU = classifier.decisions([texts[question] for question in questions])
    own_N = decisions_NU[np.arange(len(questions)), [column[person] for person in people]]
    above_N = (decisions_NU > own_N[:, None]).sum(axis=1)
    level_N = (decisions_NU == own_N[:, None]).sum(axis=1) - 1
    others = len(classifier.users) - 1
    return {
        "authorship": Scores(questions, people, (above_N + level_N == 0).astype(np.float64), chance=1 / (others + 1)),
        "authorship rank": Scores(questions, people, 1 - (above_N + 0.5 * level_N) / others, chance=0.5),
    }
