"""``benchmarks/feedback_loop.py``, tiny: both loops go through the store to their tables, and go on where they were."""

import json
from functools import partial
from types import ModuleType

import pytest

import toy_serving
from palate.corpora.worlds import personas, shapes
from palate.lpo.encoding import EncodeConfig
from palate.lpo.networks import WeightsConfig
from palate.lpo.sampling import SampleConfig
from palate.lpo.stages import LpoConfig, pipeline
from palate.lpo.training import ObjectiveConfig, TuneConfig
from palate.models.shape_classifier import train_classifier
from palate.training.parallel import World
from scripts import load_script


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load_script("benchmarks/feedback_loop.py")


def test_edited_answers_are_fitted_as_the_server_fits_them(benchmark, tmp_path, capsys):
    corpus = personas.prepare(personas.PersonasConfig(out=f"{tmp_path}/personas", people=8, items=8, questions=1))
    run = toy_serving.make_run(f"{tmp_path}/run", corpus.url)
    config = benchmark.TextLoop(run=run, out=f"{tmp_path}/out", people=8, tests=1, rounds=(1, 2))
    benchmark.text_loop(config)  # ends the program if its fit is not the server's
    assert "the server's own fit of the last person is" in capsys.readouterr().out
    rows = json.loads((tmp_path / "out/table.json").read_text())["rows"]
    arms = ["feedback", "same family", "control"]
    assert {(row["arm"], row["edits"]) for row in rows if row["arm"] in arms} == {(a, n) for a in arms for n in (1, 2)}
    assert all(row["bits"] > 0 for row in rows if row["arm"] in arms)
    assert (tmp_path / "out/loop.png").stat().st_size > 1000
    made = (tmp_path / "out/scores.json").stat().st_mtime_ns
    benchmark.text_loop(config)
    assert (tmp_path / "out/scores.json").stat().st_mtime_ns == made  # nobody is read again


def test_rankings_of_what_a_model_draws_tune_it(benchmark, tmp_path, capsys, monkeypatch):
    # What it sees is not looked at here, and its training would take a minute.
    monkeypatch.setattr(benchmark, "trained_classifier", partial(train_classifier, steps=2, batch=8))
    corpus = shapes.prepare(
        shapes.ShapesConfig(
            out=f"{tmp_path}/shapes",
            scenes=60,
            pool=8,
            lists=12,
            examples=1,
            tests=1,
            users=2,
            groups=("bold",),
            held_out=0,
        )
    )
    base = pipeline(
        LpoConfig(
            lists=corpus.url,
            out=f"{tmp_path}/base",
            train_on="images",
            encode=EncodeConfig(resolution=shapes.SIDE, latent_dtype="float32"),
            learn=ObjectiveConfig(objective="denoising"),
            weights=WeightsConfig(weights="full"),
            tune=TuneConfig(steps=2, batch=4, micro_batch=4),
            grid=0,
        ),
        World(),
    )
    config = benchmark.ImagesLoop(
        corpus=corpus.url,
        base=str(base.local_folder("pipeline")),
        out=f"{tmp_path}/out",
        rounds=1,
        rankings=4,
        steps=1,
        lists=2,
        comparisons=4,
        seeds=(0,),
        sample=SampleConfig(sampler_steps=2, guidance=2.0),
    )
    for arm in ("base", *benchmark.ARMS):
        benchmark.run_images((arm, 0), config)
    for arm in benchmark.ARMS:
        assert (tmp_path / f"out/{arm}-0/lists-1/manifest.json").is_file()  # the store's rankings, as lists
    benchmark.images_report(config)
    said = capsys.readouterr().out
    assert "| 1 | 4 | feedback against control |" in said
    rows = {row["arm"]: row for row in json.loads((tmp_path / "out/table.json").read_text())["rows"]}
    assert set(rows) == {"base", *benchmark.ARMS, "difference", "feedback against control"}
    assert all(0 <= rows[arm]["win"] <= 1 for arm in benchmark.ARMS)
