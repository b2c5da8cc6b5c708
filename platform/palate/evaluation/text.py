"""LaMP's official metrics, per question, and prediction files in LaMP's shape.

The rules are those of LaMP's ``eval/evaluation.py``: strings are stripped and nothing else is normalized.

    classification   accuracy; macro F1 over all listed labels (an absent label counts 0); exact, case-sensitive match
    rating           MAE and RMSE; no clipping; what is not a number counts as the end of the scale far from the gold
    text             ROUGE-1 and ROUGE-L F-measure without stemming; METEOR beside them where its data is installed

One deliberate difference: the official script reports the median of 1,000 unseeded bootstrap means of ROUGE (it
wobbles by about 1e-4); ``Scores.value()`` is the plain mean that it estimates.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import fsspec
import numpy as np
from numpy.typing import NDArray

from palate.corpora.schema import Task
from palate.evaluation.statistics import Scores

NO_WORDNET = "not computed: WordNet is absent (nltk.download('wordnet'))"
NO_PUNKT = "not computed: the Punkt tokenizer's data is absent (nltk.download('punkt_tab'))"


@dataclass(frozen=True)
class TextEvaluation:
    """Metrics by name, rows sorted by question id; a metric that could not be computed is a string saying why."""

    metrics: dict[str, Scores | str]
    notes: tuple[str, ...]


def evaluate(
    task: Task,
    predictions: Mapping[str, str],
    golds: Mapping[str, str],
    users: Mapping[str, str] | None = None,
) -> TextEvaluation:
    """Score predictions by the task's official metrics.

    Args:
        predictions, golds: text by question id, with equal sets of ids.
        users: person by question id; without it every question counts as a person of its own.

    Raises:
        ValueError: the ids differ (naming missing and extra ones), or a gold is not what the task says.
    """
    require_equal_ids(predictions, golds)
    ids = tuple(sorted(golds))
    people = ids if users is None else tuple(users[question] for question in ids)
    predicted = [predictions[question].strip() for question in ids]
    expected = [golds[question].strip() for question in ids]
    match task.metric:
        case "classification":
            return _classification(task.labels, ids, people, predicted, expected)
        case "rating":
            return _rating(ids, people, predicted, expected)
        case "text":
            return _text(ids, people, predicted, expected)


def require_equal_ids(predictions: Mapping[str, str], golds: Mapping[str, str]) -> None:
    """The official rule: the two sets of ids are equal, or nothing is scored."""
    missing, extra = sorted(golds.keys() - predictions.keys()), sorted(predictions.keys() - golds.keys())
    if missing or extra:
        raise ValueError(
            "prediction ids and gold ids differ: "
            f"{len(missing)} missing{_some(missing)}, {len(extra)} extra{_some(extra)}. "
            "Predict every question of the split, and no others"
        )


def read_predictions(path: str) -> tuple[str, dict[str, str]]:
    """The task name and the texts by id of a file ``{"task": ..., "golds": [{"id": ..., "output": ...}]}``.

    Predictions and golds have the same shape (the key is ``golds`` in both).

    Raises:
        ValueError: another shape, a repeated id, or an output that is not a string; the message names it.
    """
    with fsspec.open(str(path), "rt", encoding="utf-8") as stream:
        content = json.load(stream)
    if not isinstance(content, dict) or not isinstance(content.get("golds"), list) or "task" not in content:
        raise ValueError(f'{path}: expected {{"task": ..., "golds": [{{"id": ..., "output": ...}}]}}')
    texts: dict[str, str] = {}
    for row, record in enumerate(content["golds"]):
        if not isinstance(record, dict) or "id" not in record or not isinstance(record.get("output"), str):
            raise ValueError(f"{path}: entry {row} of golds needs an id and an output that is a string")
        if str(record["id"]) in texts:
            raise ValueError(f"{path}: id {record['id']!r} occurs more than once")
        texts[str(record["id"])] = record["output"]
    return str(content["task"]), texts


def write_predictions(path: str, task_name: str, predictions: Mapping[str, str]) -> None:
    """Write predictions as LaMP's evaluation script reads them, sorted by id."""
    content = {"task": task_name, "golds": [{"id": q, "output": predictions[q]} for q in sorted(predictions)]}
    with fsspec.open(str(path), "wt", encoding="utf-8") as stream:
        json.dump(content, stream, ensure_ascii=False, indent=1)
        stream.write("\n")


def macro_f1(label_rates: NDArray[np.float64]) -> NDArray[np.float64]:
    """Macro F1 from rates of (true positive, predicted, gold) per label: (..., 3 L) -> (...).

    F1 = 2 TP / (predicted + gold) does not change when all counts are scaled, so means do instead of counts.
    """
    hits, predicted, gold = np.moveaxis(label_rates.reshape(*label_rates.shape[:-1], -1, 3), -1, 0)
    total = predicted + gold
    return np.divide(2 * hits, total, out=np.zeros_like(total), where=total > 0).mean(axis=-1)


def root_mean(means: NDArray[np.float64]) -> NDArray[np.float64]:
    """RMSE from the mean squared error: (..., 1) -> (...)."""
    return np.sqrt(means[..., 0])


def parse_rating(prediction: str, gold: float) -> tuple[float, bool]:
    """The rating a prediction states, and whether it stated one; else the end of 1..5 that is farther from the gold.

    As in the official script a gold of 3 gives 5, and numbers outside the scale count as they are.
    """
    try:
        return float(prediction), True
    except ValueError:
        return (1.0 if abs(1 - gold) > abs(5 - gold) else 5.0), False


def meteor(predictions: Sequence[str], references: Sequence[str]) -> NDArray[np.float64] | str:
    """(N,) METEOR by NLTK (alpha 0.9, beta 3, gamma 0.5) on Penn Treebank tokens, or why it was not computed."""
    import nltk
    from nltk.translate.meteor_score import single_meteor_score

    try:
        nltk.data.find("corpora/wordnet")
    except LookupError:
        # NLTK also reads the corpus without unpacking it.
        try:
            nltk.data.find("corpora/wordnet.zip")
        except LookupError:
            return NO_WORDNET
    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        return NO_PUNKT
    return np.array(
        [
            single_meteor_score(
                nltk.word_tokenize(reference), nltk.word_tokenize(prediction), alpha=0.9, beta=3.0, gamma=0.5
            )
            for prediction, reference in zip(predictions, references, strict=True)
        ],
        dtype=np.float64,
    )


def _classification(
    labels: Sequence[str], ids: tuple[str, ...], users: tuple[str, ...], predicted: list[str], expected: list[str]
) -> TextEvaluation:
    position = {label: index for index, label in enumerate(labels)}
    for question, gold in zip(ids, expected, strict=True):
        if gold not in position:
            raise ValueError(f"the gold of question {question!r} is {gold!r}, which is none of the labels {labels}")
    gold_N = np.array([position[text] for text in expected], dtype=int)
    predicted_N = np.array([position.get(text, -1) for text in predicted], dtype=int)
    classes = np.arange(len(labels))
    is_gold, is_predicted = gold_N[:, None] == classes, predicted_N[:, None] == classes
    rates = np.stack([is_gold & is_predicted, is_predicted, is_gold], axis=-1).astype(np.float64)
    unknown = int(np.sum(predicted_N < 0))
    notes = (f"{unknown} of {len(ids)} predictions are none of the labels: they count as wrong",) if unknown else ()
    return TextEvaluation(
        {
            "accuracy": Scores(ids, users, (gold_N == predicted_N).astype(np.float64)),
            "f1": Scores(ids, users, rates.reshape(len(ids), 3 * len(labels)), combine=macro_f1),
        },
        notes,
    )


def _rating(ids: tuple[str, ...], users: tuple[str, ...], predicted: list[str], expected: list[str]) -> TextEvaluation:
    errors = np.empty(len(ids))
    unparsed = 0
    for row, (question, prediction, gold) in enumerate(zip(ids, predicted, expected, strict=True)):
        try:
            target = float(gold)
        except ValueError:
            raise ValueError(f"the gold of question {question!r} is {gold!r}, expected a number") from None
        rating, parsed = parse_rating(prediction, target)
        errors[row] = rating - target
        unparsed += not parsed
    notes = (
        (f"{unparsed} of {len(ids)} predictions are no number: they count as the end of the scale far from the gold",)
        if unparsed
        else ()
    )
    return TextEvaluation(
        {
            "MAE": Scores(ids, users, np.abs(errors), higher_is_better=False),
            "RMSE": Scores(ids, users, errors**2, combine=root_mean, higher_is_better=False),
        },
        notes,
    )


def _text(ids: tuple[str, ...], users: tuple[str, ...], predicted: list[str], expected: list[str]) -> TextEvaluation:
    from rouge_score import rouge_scorer, tokenize

    scorer = rouge_scorer.RougeScorer(["rouge1", "rougeL"], use_stemmer=False)
    scored = [scorer.score(gold, prediction) for gold, prediction in zip(expected, predicted, strict=True)]
    metrics: dict[str, Scores | str] = {
        name: Scores(ids, users, np.array([row[key].fmeasure for row in scored], dtype=np.float64))
        for name, key in (("rouge-1", "rouge1"), ("rouge-L", "rougeL"))
    }
    value: Any = meteor(predicted, expected)
    metrics["meteor"] = value if isinstance(value, str) else Scores(ids, users, value)
    tokenless = sum(1 for gold in expected if not tokenize.tokenize(gold, None))
    notes = (
        (
            f"{tokenless} of {len(ids)} golds hold no letter a-z and no digit (such as text in another script): "
            "ROUGE's tokenizer drops everything else, so they score 0 whatever is predicted",
        )
        if tokenless
        else ()
    )
    return TextEvaluation(metrics, notes)


def _some(ids: Sequence[str]) -> str:
    return f" ({', '.join(ids[:5])}{', …' if len(ids) > 5 else ''})" if ids else ""
