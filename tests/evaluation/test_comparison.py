"""The whole comparison on a tiny random model: what is made, from what, and that nothing is made twice."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from palate import artifacts
from palate.card import adapters
from palate.card.adaptation import AdaptConfig, group_name
from palate.card.correction import FeatureMap, Head
from palate.card.preferences import Prior
from palate.corpora.schema import read_items, read_questions
from palate.corpora.worlds import personas
from palate.evaluation import comparison, subject, text, text_report
from palate.evaluation.cases import sample_people, select_cases
from palate.models.causal_lm import load_causal_lm
from palate.serving.engine import Engine, Request

WIDTH, PEOPLE, QUESTIONS = 4, 8, 2


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("comparison")


@pytest.fixture(scope="module")
def corpus(place: Path) -> artifacts.Artifact:
    config = personas.PersonasConfig(out=str(place / "corpus"), people=PEOPLE, items=4, questions=QUESTIONS)
    return personas.prepare(config)


@pytest.fixture(scope="module")
def run(place: Path, corpus: artifacts.Artifact) -> subject.Subject:
    """A run with two random cluster adapters, a random head and random vectors."""
    generator = torch.Generator().manual_seed(0)
    loaded = load_causal_lm("tiny")
    fingerprint = loaded.fingerprint
    lora = adapters.LoraConfig(rank=2, alpha=4.0, targets=adapters.ATTENTION)
    adapters.pack(loaded.model, 2, lora)
    for _, layer in adapters.packed_layers(loaded.model):
        for parameter in layer.B:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)

    def produce(writer: artifacts.Writer) -> None:
        for cluster in range(2):
            adapters.export_adapter(loaded.model, cluster, lora, writer.folder / group_name(cluster), "tiny")

    trained = artifacts.ensure(place / "adapters", produce, kind="card-adapters", config={})
    width, vocabulary = fingerprint["hidden_size"], fingerprint["vocab_size"]
    features = FeatureMap((1, 2), torch.zeros(2, width), torch.ones(2, width), torch.eye(width))
    head = Head(
        features,
        torch.randn(width, WIDTH, generator=generator) / width**0.5,
        torch.randn(vocabulary, WIDTH, generator=generator),
        top_k=20,
    )
    users = sorted({item.user_id for item in read_items(corpus)})
    return subject.Subject(
        model="tiny",
        fingerprint=fingerprint,
        adapters=[trained.local_folder(group_name(cluster)) for cluster in range(2)],
        clusters={user: index % 2 for index, user in enumerate(users)},
        vectors={user: torch.randn(WIDTH, generator=generator) for user in users},
        learned_from=frozenset(users),
        head=head,
        prior=Prior(torch.zeros(WIDTH), torch.ones(WIDTH)),
        beta=1.0,
        history_k=0,
        max_prompt_tokens=200,
        max_answer_tokens=24,
        adapt=AdaptConfig(rank=2, alpha=4.0, targets=adapters.ATTENTION, epochs=1, batch=8, learning_rate=1e-3),
        adapter_seed=0,
        inputs={"adapters": trained},
    )


@pytest.fixture(scope="module")
def config(place: Path, corpus: artifacts.Artifact) -> comparison.TextConfig:
    return comparison.TextConfig(
        run="",
        corpus=corpus.url,
        out=str(place / "out"),
        users="all",
        retrieval_k=(1, 2),
        negatives=2,
        draws=3,
        generation_draws=2,
        per_user_sample=2,
        max_new_tokens=6,
        resamples=200,
        slots=8,
    )


@pytest.fixture(scope="module")
def report(config: comparison.TextConfig, corpus: artifacts.Artifact, run: subject.Subject) -> artifacts.Artifact:
    return text_report.make_report(comparison.Comparison(config, corpus, run))


@pytest.fixture
def compared(
    config: comparison.TextConfig, corpus: artifacts.Artifact, run: subject.Subject, report: artifacts.Artifact
) -> comparison.Comparison:
    return comparison.Comparison(config, corpus, run)


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(comparison, "load_causal_lm", refuse)


def test_another_system_is_added_without_redoing_the_others(config, corpus, run, tmp_path) -> None:
    few = dataclasses.replace(config, out=str(tmp_path / "out"), systems=("base", "cluster"))
    text_report.make_report(comparison.Comparison(few, corpus, run))
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("[gl]*/*/manifest.json")}
    assert len(kept) == 4
    more = dataclasses.replace(few, systems=("base", "cluster", "card"))
    made = text_report.make_report(comparison.Comparison(more, corpus, run))
    assert set(made.read_json("report.json")["systems"]) >= {"base", "cluster", "card"}
    assert kept == {path: path.stat().st_mtime_ns for path in kept}


def test_fresh_begins_anew_and_touches_nothing_of_others(config, corpus, run, report, tmp_path) -> None:
    settings = dataclasses.replace(config, out=str(tmp_path / "out"), systems=("base", "shared"))
    text_report.make_report(comparison.Comparison(settings, corpus, run))
    trained = tmp_path / "out" / "adapters-shared" / "manifest.json"
    before = trained.stat().st_mtime_ns
    (tmp_path / "out" / "notes.txt").write_text("mine")
    other = dataclasses.replace(settings, max_new_tokens=3)
    with pytest.raises(artifacts.ArtifactMismatch, match=r"'max_new_tokens' was 6, is now 3.*pass --fresh"):
        text_report.make_report(comparison.Comparison(other, corpus, run))
    assert trained.stat().st_mtime_ns == before
    made = text_report.make_report(comparison.Comparison(dataclasses.replace(other, fresh=True), corpus, run))
    assert made.config["max_new_tokens"] == 3
    assert trained.stat().st_mtime_ns > before
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_the_report_has_every_system_and_metric(report: artifacts.Artifact) -> None:
    metrics = report.read_json("report.json")["metrics"]
    systems = ["base", "retrieval-1", "retrieval-2", "shared", "per-user", "cluster", "card", "card-retrieval"]
    systems += ["card-permuted", "card-mean", "card-random"]
    for system in systems:
        for metric in ("rouge-1", "rouge-L", "bits per token", "policy accuracy", "trait accuracy", "authorship rank"):
            users = 2 if system == "per-user" else PEOPLE
            assert metrics[f"{metric}/{system}"]["n"] == users
            assert np.isfinite(metrics[f"{metric}/{system}"]["value"])
        assert (f"pair accuracy/{system}" in metrics) == (system != "base")
    assert metrics["bits per token/card - card-permuted"]["smallest_detectable_difference"] > 0
    assert metrics["authorship/own-texts"]["n"] == PEOPLE
    markdown = report.local("report.md").read_text()
    for heading in ("What the vectors promote and demote", "Examples", "Cost", "Notes"):
        assert f"## {heading}" in markdown
    assert set(report.paths(suffix=".png")) == {"systems.png", "differences.png"}
    assert set(report.summary) >= {"bits per token/card - card-permuted"}


def test_a_second_time_nothing_is_made(
    compared: comparison.Comparison, report: artifacts.Artifact, no_model: None
) -> None:
    again = text_report.make_report(compared)
    assert again.created == report.created


def test_a_system_more_makes_only_its_own(
    compared: comparison.Comparison, config: comparison.TextConfig, no_model: None
) -> None:
    fewer = dataclasses.replace(config, systems=("base", "cluster"))
    made = comparison.Comparison(fewer, compared.corpus, compared.subject).make()  # all is there: no model is loaded
    assert set(made) == {"likelihoods base-0", "likelihoods cluster-0", "answers base", "answers cluster"}
    other = dataclasses.replace(config, systems=("base",), out=config.out + "-other")
    with pytest.raises(AssertionError, match="a model was loaded"):
        comparison.Comparison(other, compared.corpus, compared.subject).make()


def test_answers_are_those_of_the_engine_with_own_adapter_and_vector(compared: comparison.Comparison) -> None:
    spec, run = compared.systems["card"], compared.subject
    loaded = load_causal_lm("tiny")
    rows = adapters.load_adapters(loaded.model, run.adapters)
    case = compared.cases[3]
    user = case.question.user_id
    prompt = compared._prompts([case], 0, loaded)[0]
    engine = Engine(loaded, rows, run.head, slots=1, max_length=300)
    request = Request(prompt, run.clusters[user], run.vectors[user], 1.0, 6)
    expected = engine.generate([request])[0].text
    assert compared.answers(spec)[0][case.question.question_id] == expected
    assert compared.answers(compared.systems["cluster"])[0][case.question.question_id] != expected


def test_likelihoods_are_those_of_the_plain_model(compared: comparison.Comparison) -> None:
    loaded = load_causal_lm("tiny")
    table = compared.table(("base", 0))
    case = compared.cases[0]
    prompt = compared._prompts([case], 0, loaded)[0]
    answer = [*loaded.tokenizer(case.gold, add_special_tokens=False).input_ids, loaded.eos_ids[0]][:24]
    with torch.no_grad():
        logits = loaded.model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1)[torch.arange(len(answer)), torch.tensor(answer)].sum()
    row = next(
        r
        for r, key in enumerate(zip(table.questions, table.numbers, strict=True))
        if key == (case.question.question_id, 0)
    )
    assert table.log_probs[row] == pytest.approx(float(expected), abs=1e-3)
    assert table.tokens[row] == len(answer)
    assert len(table.questions) == PEOPLE * QUESTIONS * 3


def test_per_user_adapters_learn_from_their_own_person_only(compared: comparison.Comparison) -> None:
    made = compared.adapters("user")
    assert made.summary["people"] == compared.sampled
    assert made.summary["texts"] == 4 * len(compared.sampled)
    assert made.summary["updates"].keys() == {group_name(0), group_name(1)}
    assert compared.adapters("shared").summary["texts"] == 4 * PEOPLE
    alone = dataclasses.replace(compared.config, per_user_start="base", out=compared.config.out + "-alone")
    pair = comparison.Comparison(alone, compared.corpus, compared.subject).adapters("user")
    single = dataclasses.replace(alone, per_user_sample=1, out=compared.config.out + "-single")
    one = comparison.Comparison(single, compared.corpus, compared.subject)
    assert len(one.sampled) == 1
    assert one.adapters("user").summary["texts"] == 4
    assert pair.summary["texts"] == 8


def test_predictions_have_lamps_shape(compared: comparison.Comparison) -> None:
    path = compared.generations(compared.systems["base"]).local("predictions.json")
    task, found = text.read_predictions(str(path))
    assert task == "personas"
    assert found.keys() == {question.question_id for question in read_questions(compared.corpus)}


def test_words_are_written(report: artifacts.Artifact) -> None:
    said = json.loads(report.local("words.json").read_text())
    assert len(said) == PEOPLE
    assert all(words["promoted"] and words["demoted"] for words in said.values())


def test_unknown_systems_and_empty_choices_are_refused(
    config: comparison.TextConfig, corpus: artifacts.Artifact, run: subject.Subject
) -> None:
    with pytest.raises(ValueError, match="--systems nonsense"):
        comparison.Comparison(dataclasses.replace(config, systems=("nonsense",)), corpus, run)
    with pytest.raises(ValueError, match="--users all"):
        comparison.Comparison(config, corpus, dataclasses.replace(run, clusters={}))


def test_cases_are_of_the_chosen_people_and_negatives_of_others(corpus: artifacts.Artifact) -> None:
    questions, items = read_questions(corpus), read_items(corpus)
    clusters = {item.user_id: 0 for item in items}
    development = select_cases(questions, items, clusters, "development", negatives=3)
    test = select_cases(questions, items, clusters, "test", negatives=3)
    people = [{case.question.user_id for case in cases} for cases in (development, test)]
    assert people[0] & people[1] == set()
    assert len(people[0] | people[1]) == PEOPLE
    authors = {item.output: item.user_id for item in items}
    for case in development:
        assert len(case.negatives) == 3
        assert all(authors[negative] != case.question.user_id for negative in case.negatives)
    few = select_cases(questions, items, clusters, "all", negatives=0, max_users=3, max_questions=1)
    assert len(few) == 3
    assert {case.negatives for case in few} == {()}


def test_samples_do_not_depend_on_order() -> None:
    people = [f"u{n}" for n in range(20)]
    assert sample_people(people, 5, 1) == sample_people(set(people), 5, 1)
    assert sample_people(people, 5, 1) != sample_people(people, 5, 2)
    assert sample_people(people, None, 1) == sample_people(people, 99, 1) == sorted(people)
