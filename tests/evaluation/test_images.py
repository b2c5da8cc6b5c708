"""Same-seed comparisons of tuned image generators: statistics against closed forms, then whole evaluations."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scipy.stats import binomtest, norm

import toy_images
import toy_lists
from palate import artifacts
from palate.artifacts import Artifact, ArtifactMismatch, Writer
from palate.corpora.pictures import read_images
from palate.corpora.schema import RANKED_LISTS
from palate.corpora.worlds import shapes
from palate.evaluation import images, scorers, statistics
from palate.evaluation.images import Comparison, ImagesConfig, crossed, make_report, win_rate, wins
from palate.evaluation.prompts import PromptError, corpus_prompts, read_prompts
from palate.evaluation.scorers import ScorerConfig
from palate.lpo.sampling import SampleConfig
from palate.lpo.stages import TUNED
from palate.models.diffusion import load_diffusion
from palate.models.shape_classifier import ShapeClassifier

FAST = SampleConfig(sampler_steps=2, guidance=2.0, batch=32)


# Statistics


def test_with_one_run_it_is_the_bootstrap_over_prompts() -> None:
    random = np.random.default_rng(0)
    units = np.repeat(np.arange(12), 3)
    values = random.uniform(size=(1, 36))
    ours = crossed(values, units, resamples=2000, seed=5)
    theirs = statistics.estimate(values[0], [f"{unit:02d}" for unit in units], resamples=2000, seed=5)
    assert (ours.value, ours.low, ours.high) == pytest.approx((theirs.value, theirs.low, theirs.high), abs=1e-12)
    assert (ours.n, ours.questions) == (12, 36)


def test_the_interval_of_independent_comparisons_is_the_binomials() -> None:
    random = np.random.default_rng(1)
    count = 2000
    won = (random.uniform(size=(1, count)) < 0.6).astype(float)
    found = win_rate(won, np.arange(count), resamples=4000)
    exact = binomtest(int(won.sum()), count).proportion_ci(0.95)
    assert found.value == pytest.approx(won.mean())
    assert (found.low, found.high) == pytest.approx((exact.low, exact.high), abs=0.003)
    error = np.sqrt(found.value * (1 - found.value) / count)
    assert found.standard_error == pytest.approx(error, rel=0.05)
    assert found.smallest_detectable_difference == pytest.approx((norm.ppf(0.975) + norm.ppf(0.8)) * error, rel=0.05)


def test_units_and_runs_are_resampled_independently() -> None:
    """Of values a_p + b_k the bootstrap variance is var(a)/P + var(b)/K, and a loop gives the same distribution."""
    random = np.random.default_rng(2)
    a, b = random.normal(size=30), random.normal(size=5)
    values = a[None, :] + b[:, None]
    found = crossed(values, np.arange(30), resamples=20_000)
    assert found.standard_error**2 == pytest.approx(a.var() / 30 + b.var() / 5, rel=0.05)
    means = []
    for _ in range(4000):
        prompts, runs = random.integers(30, size=30), random.integers(5, size=5)
        means.append(values[np.ix_(runs, prompts)].mean())
    low, high = np.quantile(means, [0.025, 0.975])
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.06)


def test_seeds_of_a_prompt_are_not_independent() -> None:
    won = np.repeat([1.0, 0.0] * 20, 10)[None]  # every prompt wins or loses at all its seeds
    together = win_rate(won, np.repeat(np.arange(40), 10), resamples=2000)
    assert together.standard_error == pytest.approx(np.sqrt(0.25 / 40), rel=0.1)


def test_ties_are_half_and_lower_can_be_better() -> None:
    ours, theirs = np.array([[1.0, 2.0, 3.0]]), np.array([[1.0, 3.0, 2.0]])
    assert wins(ours, theirs).tolist() == [[0.5, 0.0, 1.0]]
    assert wins(ours, theirs, higher_is_better=False).tolist() == [[0.5, 1.0, 0.0]]
    assert (wins(ours, theirs) + wins(theirs, ours) == 1).all()
    assert wins(np.stack([ours[0]] * 3), theirs).shape == (3, 3)
    with pytest.raises(ValueError, match="found 2 and 3"):
        wins(np.zeros((2, 4)), np.zeros((3, 4)))


@pytest.mark.parametrize("won", [0, 1])
def test_a_clean_sweep_is_not_certain(won: int) -> None:
    found = win_rate(np.full((1, 25), float(won)), np.arange(25), resamples=50)
    exact = binomtest(25 * won, 25).proportion_ci(0.95, method="exact")
    assert (found.low, found.high) == pytest.approx((exact.low, exact.high))


def test_drift_is_a_ratio_of_means() -> None:
    both = np.array([[[2.0, 1.0], [4.0, 3.0]]])
    found = crossed(both, np.arange(2), combine=images.relative_error, resamples=50)
    assert found.value == pytest.approx(6 / 4 - 1)


# Prompts


def test_parti_prompts_as_published(tmp_path: Path) -> None:
    file = tmp_path / "PartiPrompts.tsv"
    file.write_text(
        "Prompt\tCategory\tChallenge\tNote\n"
        'A robot. The words "Fly an airplane" are on the wall.\tOutdoor Scenes\tComplex\t\n'
        '"bond\tAbstract\tBasic\tBiology\n'
        "bond\tAbstract\tBasic\tBiology\nbond\tAbstract\tBasic\tagain\n"
    )
    found = read_prompts(file)
    assert [prompt.text for prompt in found] == [
        'A robot. The words "Fly an airplane" are on the wall.',
        '"bond',
        "bond",
    ]
    assert [prompt.category for prompt in found] == ["Outdoor Scenes", "Abstract", "Abstract"]
    file.write_text("prompt\tCategory\nx\ty\n")
    with pytest.raises(PromptError, match="no column Prompt"):
        read_prompts(file)


def test_hpsv2_as_a_folder_a_file_and_an_object(tmp_path: Path) -> None:
    (tmp_path / "anime.json").write_text('["a", "b"]')
    (tmp_path / "photo.json").write_text('["c"]')
    assert [(p.text, p.category) for p in read_prompts(tmp_path)] == [("a", "anime"), ("b", "anime"), ("c", "photo")]
    assert [p.category for p in read_prompts(tmp_path / "photo.json")] == ["photo"]
    (tmp_path / "all.json").write_text('{"anime": ["a"], "photo": ["c"]}')
    assert [p.category for p in read_prompts(tmp_path / "all.json")] == ["anime", "photo"]


def test_plain_files_and_what_is_wrong_with_them(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\n two \none\n")
    assert [prompt.text for prompt in read_prompts(tmp_path / "a.txt")] == ["one", "two"]
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"prompt": "x", "category": "k", "source": "s.png", "target": "t.png"}\n')
    (prompt,) = read_prompts(lines)
    assert (prompt.category, prompt.source, prompt.target) == ("k", str(tmp_path / "s.png"), str(tmp_path / "t.png"))
    for content, message in {
        '{"text": "x"}': "line 1: expected",
        '{"prompt": "x", "sauce": 1}': "no field 'sauce'",
        '{"prompt": " "}': "entry 1",
        '{"prompt": "x", "target": "t.png"}': "needs the source",
        '{"prompt": "x"}\n{"prompt": "y", "source": "s.png"}': "two files",
        "": "no prompt",
        "{": "Expecting",
    }.items():
        lines.write_text(content)
        with pytest.raises(PromptError, match=message):
            read_prompts(lines)
    for name, message in {"b.txt": "no such file", "b.csv": "are not read"}.items():
        with pytest.raises(PromptError, match=message):
            read_prompts(tmp_path / name)


def test_held_out_captions_and_people(tmp_path: Path) -> None:
    rows = [toy_lists.row(number, 2, user_id=f"u{number}") for number in range(12)]
    rows[0]["user_id"] = "u11"  # in train, and in test
    lists = toy_lists.write(tmp_path / "lists", rows)
    assert [prompt.text for prompt in corpus_prompts(lists)] == [toy_lists.CAPTIONS[2]]  # lists 5 and 11
    found = {prompt.user_id: prompt.category for prompt in corpus_prompts(lists, people=True)}
    assert found == {"u5": "held-out", "u11": "held-in"}
    with pytest.raises(PromptError, match="no list in split 'validation'"):
        corpus_prompts(lists, split="validation")


# Whole evaluations


@pytest.fixture(autouse=True)
def _untrained_classifier(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it sees is tested elsewhere; its training takes many seconds."""
    monkeypatch.setattr(scorers, "trained_classifier", lambda: ShapeClassifier().eval())


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    out = tmp_path_factory.mktemp("world") / "corpus"
    return shapes.prepare(
        shapes.ShapesConfig(out=str(out), scenes=200, pool=8, lists=8, examples=1, tests=4, lengths=(2,), users=4)
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("runs")
    return {
        "a0": toy_images.lora_run(folder / "a0", seed=0),
        "a1": toy_images.lora_run(folder / "a1", seed=1),
        "full": toy_images.pipeline_run(folder / "full"),
        "people": toy_images.person_run(folder / "people", people=["annotator-0000", "annotator-0001"]),
    }


def config(out: Path, **changes: Any) -> ImagesConfig:
    given = {"max_prompts": 5, "images": 2, "sample": FAST, "drift_images": 6, "resamples": 200, "shown": 2, **changes}
    return ImagesConfig(out=str(out), **given)


def test_runs_against_the_base_and_each_other(world: Artifact, runs: dict[str, str], tmp_path: Path) -> None:
    given = (f"a={runs['a0']}", f"a={runs['a1']}", f"full={runs['full']}")
    settings = config(tmp_path, run=given, corpus=world.url)
    made = make_report(Comparison(settings))
    content = made.read_json("report.json")
    metrics = content["metrics"]
    for name in ("utility win rate/a", "utility win rate/full", "utility win rate/full against a"):
        assert 0 <= metrics[name]["low"] <= metrics[name]["value"] <= metrics[name]["high"] <= 1
        assert metrics[name]["n"] == 5
        assert metrics[name]["chance"] == 0.5
    assert metrics["utility win rate/a"]["items"] == 2 * 5 * 2  # runs, prompts, images
    assert "recognised win rate/a" not in metrics
    assert metrics["drift/full"]["n"] == 6
    assert metrics["drift/full"]["value"] != 0
    text = made.local("report.md").read_text()
    assert "| prompts |" in text
    assert "users" not in text.split("## Configuration")[0].replace("Owen", "")
    assert {"systems.png", "differences.png", "images.png"} <= set(made.paths())

    # What is reported follows from the images that were kept, by an independent computation.
    def kept(name: str) -> list[dict[str, Any]]:
        return pq.read_table(tmp_path / "images" / name / "00000" / "images.parquet").to_pylist()

    taste = np.mean([one.weights for one in shapes.read_annotators(world)], axis=0)

    def utilities(name: str) -> np.ndarray:
        pictures = np.stack([shapes.decode_png(row["png"]) for row in kept(name)])
        return ((shapes.measure(pictures) - shapes.MEANS) / shapes.SPREADS) @ taste

    base, full = utilities("base"), utilities("full-0")
    expected = np.mean([1.0 if f > b else 0.5 if f == b else 0.0 for f, b in zip(full, base, strict=True)])
    assert metrics["utility win rate/full"]["value"] == pytest.approx(expected)
    assert metrics["utility/full - base"]["value"] == pytest.approx((full - base).mean())
    seeds = {name: [row["seed"] for row in kept(name)] for name in ("base", "a-0", "a-1", "full-0")}
    assert len(set(map(tuple, seeds.values()))) == 1  # the same in every system
    assert len(set(seeds["base"])) == 10  # and each image's own


def test_another_scorer_draws_nothing_again(
    world: Artifact, runs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(tmp_path, run=(f"a={runs['a0']}",), corpus=world.url)
    first = make_report(Comparison(settings))
    monkeypatch.setattr(images, "load_model", lambda *_: pytest.fail("a model was loaded again"))
    assert make_report(Comparison(settings)).created == first.created
    again = make_report(Comparison(config(tmp_path, run=settings.run, corpus=world.url, resamples=300)))
    assert again.config["resamples"] == 300
    other = config(tmp_path, run=settings.run, corpus=world.url, seed=1)
    with pytest.raises(ArtifactMismatch, match="seed"):
        make_report(Comparison(other))


def test_a_run_that_changes_nothing_ties(world: Artifact, tmp_path: Path) -> None:
    def produce(writer: Writer) -> None:
        images.load_diffusion("shapes").pipeline.save_pretrained(writer.folder / "pipeline")

    described = {"model": "shapes", "base_weights": load_diffusion("shapes").weights}
    artifacts.ensure(tmp_path / "same" / "tuned", produce, kind=TUNED, config=described)
    made = make_report(Comparison(config(tmp_path / "out", run=(str(tmp_path / "same"),), corpus=world.url)))
    metrics = made.read_json("report.json")["metrics"]
    assert metrics["utility win rate/same"]["value"] == 0.5
    assert metrics["colourfulness/same - base"]["value"] == 0
    assert metrics["drift/same"]["value"] == pytest.approx(0, abs=1e-9)


def test_people_get_images_of_their_own(world: Artifact, runs: dict[str, str], tmp_path: Path) -> None:
    settings = config(tmp_path, run=(f"p={runs['people']}",), corpus=world.url, people=True, max_prompts=16)
    made = make_report(Comparison(settings))
    metrics = made.read_json("report.json")["metrics"]
    assert metrics["utility win rate/p"]["n"] == 4
    assert metrics["drift/p"]["value"] != 0
    categories = made.read_json("categories.json")
    assert {name.rpartition("/")[2] for name in categories} == {"held-in", "held-out"}

    def drawn(name: str) -> dict[tuple[str, int], bytes]:
        rows = pq.read_table(tmp_path / "images" / name / "00000" / "images.parquet").to_pylist()
        return {(row["prompt"], row["number"]): row["png"] for row in rows}

    base, tuned = drawn("base"), drawn("p-0")
    for (prompt, number), content in tuned.items():
        known = json.loads(prompt)[1] in ("annotator-0000", "annotator-0001")
        assert (content != base[prompt, number]) == known  # a stranger's image is the base's, bit for bit


def test_edits_are_compared_with_their_targets(tmp_path: Path) -> None:
    world = shapes.prepare(
        shapes.ShapesConfig(
            out=str(tmp_path / "corpus"), scenes=40, lists=4, examples=1, tests=3, lengths=(2,), users=2, edits=True
        )
    )
    run = toy_images.lora_run(tmp_path / "run", base="shapes-edit")
    settings = config(tmp_path / "out", run=(f"e={run}",), corpus=world.url, max_prompts=3)
    made = make_report(Comparison(settings))
    metrics = made.read_json("report.json")["metrics"]
    assert metrics["l1/e"]["higher_is_better"] is False
    assert metrics["drift/e"]["value"] != 0
    rows = pq.read_table(world.local("targets.parquet")).to_pylist()
    targets = read_images(world, {row["target_uid"] for row in rows})
    drawn = pq.read_table(tmp_path / "out" / "images" / "e-0" / "00000" / "images.parquet").to_pylist()
    distances: dict[str, list[float]] = {}  # by instruction, which weigh alike
    for row in drawn:
        instruction, _, _, target = json.loads(row["prompt"])
        distance = np.abs(shapes.decode_png(row["png"]) - shapes.decode_png(targets[target])).mean()
        distances.setdefault(instruction, []).append(distance)
    assert metrics["l1/e"]["value"] == pytest.approx(np.mean([np.mean(some) for some in distances.values()]))
    assert "utility win rate/e" in metrics


def test_a_prompt_file_without_a_corpus(runs: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "prompts.json"
    file.write_text('{"x": ["a red circle", "a blue square"], "y": ["a green cross"]}')
    settings = config(tmp_path / "out", run=(f"a={runs['a0']}",), prompts=str(file))
    made = make_report(Comparison(settings))
    metrics = made.read_json("report.json")["metrics"]
    assert {name.split("/")[0] for name in metrics} == {"colourfulness", "colourfulness win rate"}
    assert set(made.read_json("categories.json")) == {f"colourfulness win rate/a/{c}" for c in ("x", "y")}
    assert "drift: not measured" in made.local("report.md").read_text()


def test_what_does_not_go_together(world: Artifact, runs: dict[str, str], tmp_path: Path) -> None:
    other = toy_images.lora_run(tmp_path / "other", base="shapes-edit")
    file = tmp_path / "edits.jsonl"
    Image.new("RGB", (16, 16), "blue").save(tmp_path / "s.png")
    file.write_text('{"prompt": "make the circle red", "source": "s.png"}')
    base = tmp_path / "base"
    made = load_diffusion("shapes").pipeline
    made.save_pretrained(base)
    replaced = toy_images.lora_run(tmp_path / "replaced", base=str(base))
    made.unet.conv_out.weight.data.mul_(2)
    made.unet.save_pretrained(base / "unet")
    a = f"a={runs['a0']}"
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ArtifactMismatch, "only runs of one base model", {"run": (a, f"b={other}"), "corpus": world.url}),
        (ArtifactMismatch, "was tuned from weights", {"run": (f"r={replaced}",), "corpus": world.url}),
        (ValueError, "a has 2, b has 3", {"run": (a, a, *[f"b={runs['a0']}"] * 3), "corpus": world.url}),
        (ValueError, "--run is missing", {"run": (), "corpus": world.url}),
        (ValueError, "not 'base'", {"run": (f"base={runs['a0']}",), "corpus": world.url}),
        (ValueError, "give --prompts, or --corpus", {"run": (a,)}),
        (ValueError, "at least 1", {"run": (a,), "corpus": world.url, "images": 0}),
        (ValueError, "edits no images", {"run": (a,), "prompts": str(file)}),
        (ValueError, "needs the package image-reward", {"run": (a,), "corpus": world.url, "max_prompts": 1}),
    ]
    for number, (kind, message, changes) in enumerate(cases):
        score = ScorerConfig(imagereward="ImageReward.pt") if "package" in message else ScorerConfig()
        with pytest.raises(kind, match=message):
            make_report(Comparison(config(tmp_path / f"{number}", score=score, **changes)))


def test_held_out_images_without_scenes_are_the_best_of_lists(tmp_path: Path) -> None:
    lists = toy_lists.lists(tmp_path / "lists")
    rows = images.held_out(lists, config(tmp_path, run=()))
    assert sorted(row["image"] for row in rows) == ["i11-0", "i17-0", "i23-0", "i5-0"]
    empty = tmp_path / "no-images"

    def produce(writer: Writer) -> None:
        (writer.folder / "lists").mkdir()
        pq.write_table(
            pa.Table.from_pylist([toy_lists.row(5, 2)], schema=images.LISTS), writer.folder / "lists" / "0.parquet"
        )

    artifact = artifacts.ensure(empty, produce, kind=RANKED_LISTS, config={})
    assert images.held_out(artifact, config(tmp_path, run=())) == []
