import dataclasses
import json
import os
import runpy
import sys
from pathlib import Path

import pytest

from lamp_files import write_large
from palate import artifacts
from palate.corpora import jsonl, lamp, preparation, schema
from palate.corpora.streams import CorpusError

JOB = Path(__file__).parents[2] / "jobs" / "prepare.py"


@pytest.fixture(scope="module")
def run_with_ray(ray_cluster):
    from palate.distributed.prepare import run_with_ray

    return run_with_ray


def lamp_config(folder, out, **options):
    questions, outputs, _ = write_large(folder, megabytes=1.5)
    return lamp.LampConfig(
        task="LaMP_4", questions=(str(questions),), outputs=(str(outputs),), out=str(folder / out), **options
    )


def jsonl_config(folder, out, broken=0, **options):
    paths = []
    for part in range(3):
        rows = [
            {"user_id": f"u{number % 11}", "input": f"about {part} {number}", "output": f"text {number}"}
            for number in range(40)
        ]
        paths.append(str(folder / f"part-{part}.jsonl"))
        Path(paths[-1]).write_text("\n".join([json.dumps(row) for row in rows] + ["{"] * broken))
    return jsonl.JsonlConfig(input=tuple(paths), out=str(folder / out), **options)


@pytest.mark.parametrize(("make", "recipe"), [(lamp_config, lamp.recipe), (jsonl_config, jsonl.recipe)])
def test_ray_and_the_plain_loop_make_equal_corpora(run_with_ray, tmp_path, make, recipe):
    local = make(tmp_path, "local")
    remote = dataclasses.replace(local, out=str(tmp_path / "ray"))
    other = dataclasses.replace(local, out=str(tmp_path / "other"), buckets=3)
    plain = preparation.prepare(recipe(local), local)
    first = preparation.prepare(recipe(remote), remote, run_with_ray)
    second = preparation.prepare(recipe(other), other, run_with_ray)
    assert first.digest == plain.digest
    for corpus in (first, second):
        assert schema.read_items(corpus) == schema.read_items(plain)
        assert schema.read_questions(corpus) == schema.read_questions(plain)
        assert corpus.read_json("report.json") == plain.read_json("report.json")
        assert corpus.local("quarantine.jsonl").read_text() == plain.local("quarantine.jsonl").read_text()


def test_ray_goes_on_after_the_tasks_that_are_finished(run_with_ray, tmp_path):
    config = jsonl_config(tmp_path, "out")

    def stopping(step):
        step.run(step.tasks[0])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        preparation.prepare(jsonl.recipe(config), config, stopping)
    finished = tmp_path / "out.work" / "read" / "00000" / "manifest.json"
    before = finished.read_bytes()
    seen = []

    def watching(step):
        results = run_with_ray(step)
        seen.append(finished.read_bytes())
        return results

    preparation.prepare(jsonl.recipe(config), config, watching)
    assert set(seen) == {before}


def test_a_task_whose_worker_dies_is_run_again(run_with_ray, tmp_path):
    config = jsonl_config(tmp_path, "out")
    recipe = jsonl.recipe(config)
    plain = dataclasses.replace(config, out=str(tmp_path / "plain"))
    died = tmp_path / "died"
    read = recipe.read

    def dying(unit):
        if unit[0] == 1 and not died.exists():
            died.touch()
            os._exit(1)
        return read(unit)

    corpus = preparation.prepare(dataclasses.replace(recipe, read=dying), config, run_with_ray)
    assert died.exists()
    assert corpus.digest == preparation.prepare(jsonl.recipe(plain), plain).digest


def test_what_is_wrong_with_the_input_is_said_as_by_the_plain_loop(run_with_ray, tmp_path):
    config = jsonl_config(tmp_path, "out", broken=30)
    with pytest.raises(CorpusError) as plain:
        preparation.prepare(jsonl.recipe(config), config)
    with pytest.raises(CorpusError) as remote:
        preparation.prepare(jsonl.recipe(config), config, run_with_ray)
    assert str(remote.value) == str(plain.value)
    wrong = lamp.LampConfig(task="LaMP_4", questions=config.input, out=str(tmp_path / "wrong"))
    with pytest.raises(CorpusError, match=r"without the list 'golds'|no valid JSON|broken JSON"):
        preparation.prepare(lamp.recipe(wrong), wrong, run_with_ray)


def test_the_job_with_the_ray_launcher(run_with_ray, tmp_path, monkeypatch, capsys):
    config = jsonl_config(tmp_path, "out")
    monkeypatch.setattr(
        sys, "argv", [str(JOB), "jsonl", "--input", *config.input, "--out", config.out, "--launcher", "ray"]
    )
    runpy.run_path(str(JOB), run_name="__main__")
    assert "users: 11" in capsys.readouterr().out
    assert artifacts.open_artifact(config.out, schema.TEXT_CORPUS).verify()
