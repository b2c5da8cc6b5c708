"""LaMP's metrics against rouge-score, scikit-learn and the official rules written out."""

import json
import random
from functools import partial
from pathlib import Path

import nltk
import numpy as np
import pytest
import sklearn.metrics
from nltk.translate import meteor_score
from rouge_score import rouge_scorer

from palate.corpora.schema import Task
from palate.evaluation import text

TEXT = Task("LaMP_4", "text")
TAGS = Task("LaMP_2", "classification", labels=("comedy", "action", "classic", "psychology"))
RATING = Task("LaMP_3", "rating")


def by_id(values: list[str]) -> dict[str, str]:
    return {f"q{n:04d}": value for n, value in enumerate(values)}


def value(result: text.TextEvaluation, name: str) -> float:
    metric = result.metrics[name]
    assert not isinstance(metric, str)
    return metric.value()


def test_rouge_equals_rouge_score_without_stemming() -> None:
    draw = random.Random(0)
    words = ["running", "runs", "The", "house,", "of", "cards", "é", "2024"]
    golds = [" ".join(draw.choices(words, k=draw.randint(1, 9))) for _ in range(60)]
    predictions = [" ".join(draw.choices(words, k=draw.randint(0, 9))) for _ in range(60)]
    scorer = rouge_scorer.RougeScorer(["rouge1", "rougeL"], use_stemmer=False)
    scored = [scorer.score(gold, prediction) for gold, prediction in zip(golds, predictions, strict=True)]
    result = text.evaluate(TEXT, by_id(predictions), by_id(golds))
    for name, key in (("rouge-1", "rouge1"), ("rouge-L", "rougeL")):
        assert value(result, name) == pytest.approx(np.mean([row[key].fmeasure for row in scored]), abs=1e-12)
        metric = result.metrics[name]
        assert not isinstance(metric, str)
        np.testing.assert_allclose(metric.values, [row[key].fmeasure for row in scored], atol=1e-12)


def test_rouge_by_hand() -> None:
    result = text.evaluate(TEXT, {"q": "the cat runs home"}, {"q": "the cat run home now"})
    # No stemming: "runs" is not "run". 3 of 4 and 3 of 5 words: F = 2 * .75 * .6 / 1.35.
    assert value(result, "rouge-1") == pytest.approx(2 * 0.75 * 0.6 / 1.35)
    assert value(result, "rouge-L") == pytest.approx(2 * 0.75 * 0.6 / 1.35)


def test_classification_equals_scikit_learn_on_the_official_rules() -> None:
    draw = random.Random(1)
    options = [*TAGS.labels, "Comedy", "unheard of"]  # case matters, unknown is wrong
    golds = [draw.choice(TAGS.labels[:3]) for _ in range(80)]  # the fourth label never occurs as gold
    predictions = [f" {draw.choice(options)}\n" for _ in range(80)]
    index = {label: n for n, label in enumerate(TAGS.labels)}
    gold_N = [index[gold] for gold in golds]
    predicted_N = [index.get(prediction.strip(), -1) for prediction in predictions]
    result = text.evaluate(TAGS, by_id(predictions), by_id(golds))
    assert value(result, "accuracy") == pytest.approx(sklearn.metrics.accuracy_score(gold_N, predicted_N), abs=1e-12)
    expected = sklearn.metrics.f1_score(gold_N, predicted_N, labels=list(range(4)), average="macro", zero_division=0)
    assert value(result, "f1") == pytest.approx(expected, abs=1e-12)
    assert "none of the labels" in result.notes[0]


def test_rating_errors_follow_the_official_rule_for_what_is_no_number() -> None:
    golds = ["1", "5", "3", "4", "2"]
    predictions = [" 2.5\n", "great", "no idea", "7", "terrible"]
    # "great" at 5 counts as 1; at 3 both ends are equally far: 5; no clipping: 7 stays; at 2 the far end is 5.
    errors = [1.5, 4.0, 2.0, 3.0, 3.0]
    result = text.evaluate(RATING, by_id(predictions), by_id(golds))
    assert value(result, "MAE") == pytest.approx(np.mean(errors), abs=1e-12)
    assert value(result, "RMSE") == pytest.approx(np.sqrt(np.mean(np.square(errors))), abs=1e-12)
    assert "3 of 5 predictions are no number" in result.notes[0]


def test_values_by_user() -> None:
    users = {"q0000": "a", "q0001": "a", "q0002": "b"}
    result = text.evaluate(RATING, by_id(["1", "3", "5"]), by_id(["1", "1", "1"]), users)
    metric = result.metrics["MAE"]
    assert not isinstance(metric, str)
    assert metric.by_user() == {"a": 1.0, "b": 4.0}
    assert not metric.higher_is_better


@pytest.mark.parametrize(("absent", "reason"), [("corpora", "WordNet is absent"), ("tokenizers", "Punkt")])
def test_meteor_without_its_data_is_reported_not_dropped(
    absent: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(name: str) -> None:
        if name.startswith(absent):
            raise LookupError

    monkeypatch.setattr(nltk.data, "find", find)
    found = text.evaluate(TEXT, {"q": "a"}, {"q": "b"}).metrics["meteor"]
    assert isinstance(found, str)
    assert found.startswith("not computed")
    assert reason in found


class NoSynonyms:
    """Stands for WordNet where words have no synonyms."""

    @staticmethod
    def synsets(word: str) -> list[str]:
        return []


def test_meteor_has_nltks_alpha_beta_and_gamma(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nltk.data, "find", lambda name: None)
    monkeypatch.setattr(nltk, "word_tokenize", str.split)
    monkeypatch.setattr(
        meteor_score, "single_meteor_score", partial(meteor_score.single_meteor_score, wordnet=NoSynonyms)
    )
    found = text.meteor(["the cat sat today", "unrelated"], ["today the cat sat down", "words here"])
    assert not isinstance(found, str)
    # 4 matches in 2 chunks: P = 1, R = 4/5; F = PR / (0.9 P + 0.1 R); penalty 0.5 (2/4)^3.
    expected = 0.8 / (0.9 * 1 + 0.1 * 0.8) * (1 - 0.5 * 0.5**3)
    assert found == pytest.approx([expected, 0.0], abs=1e-12)


def test_text_that_rouge_cannot_see_is_noted() -> None:
    result = text.evaluate(TEXT, by_id(["日本語", "hello"]), by_id(["日本語", "hello"]))
    assert value(result, "rouge-1") == pytest.approx(0.5)
    assert "1 of 2 golds" in result.notes[0]


def test_ids_must_be_equal_as_sets() -> None:
    with pytest.raises(ValueError, match=r"1 missing \(q2\), 1 extra \(q3\)"):
        text.evaluate(TEXT, {"q1": "a", "q3": "b"}, {"q1": "a", "q2": "b"})


def test_golds_that_do_not_fit_the_task_are_refused() -> None:
    with pytest.raises(ValueError, match="none of the labels"):
        text.evaluate(TAGS, {"q": "comedy"}, {"q": "romance"})
    with pytest.raises(ValueError, match="expected a number"):
        text.evaluate(RATING, {"q": "1"}, {"q": "one"})


def test_prediction_files_have_lamps_shape(tmp_path: Path) -> None:
    path = str(tmp_path / "predictions.json")
    text.write_predictions(path, "LaMP_4", {"q2": "zwei", "q1": "naïve"})
    assert json.loads(Path(path).read_text()) == {
        "task": "LaMP_4",
        "golds": [{"id": "q1", "output": "naïve"}, {"id": "q2", "output": "zwei"}],
    }
    assert text.read_predictions(path) == ("LaMP_4", {"q1": "naïve", "q2": "zwei"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"id": "q", "output": "a"}], "expected"),
        ({"task": "LaMP_4", "golds": [{"id": "q"}]}, "entry 0"),
        ({"task": "LaMP_4", "golds": [{"id": "q", "output": "a"}, {"id": "q", "output": "b"}]}, "more than once"),
    ],
)
def test_other_shapes_are_refused_by_name(content: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "predictions.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        text.read_predictions(str(path))
