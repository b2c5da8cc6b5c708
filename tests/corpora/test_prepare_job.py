import dataclasses
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from lamp_files import write_large
from palate import artifacts
from palate.corpora import git, jsonl, lamp, longlamp, schema
from palate.corpora.worlds import personas, shapes
from palate.lpo.preparation import RankingsConfig
from palate.users.preparation import FeedbackConfig

JOB = Path(__file__).parents[2] / "jobs" / "prepare.py"
COMMANDS = {
    "lamp": lamp.LampConfig,
    "longlamp": longlamp.LongLampConfig,
    "jsonl": jsonl.JsonlConfig,
    "git": git.GitConfig,
    "personas": personas.PersonasConfig,
    "shapes": shapes.ShapesConfig,
    "rankings": RankingsConfig,
    "feedback": FeedbackConfig,
}


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [str(JOB), *map(str, arguments)])
    runpy.run_path(str(JOB), run_name="__main__")


@pytest.mark.parametrize("command", list(COMMANDS))
def test_help_names_every_flag(monkeypatch, capsys, command):
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, command, "--help")
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(COMMANDS[command]):
        assert f"--{field.name.replace('_', '-')}" in text


def test_an_unknown_flag_is_refused(monkeypatch, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, "personas", "--out", tmp_path / "out", "--poeple", "3")
    assert stopped.value.code == 2


def test_what_is_wrong_with_the_input_ends_the_job_with_its_message(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match=r"prepare: .*absent\.json: there is no such file"):
        run(monkeypatch, "lamp", "--questions", tmp_path / "absent.json", "--task", "LaMP_4", "--out", tmp_path / "out")


def test_a_place_that_cannot_be_written_ends_the_job_with_one_line(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"prepare: .*file"):
        run(monkeypatch, "personas", "--people", "2", "--out", str(tmp_path / "file" / "corpus"))


def test_the_local_launcher_never_imports_ray(tmp_path):
    (tmp_path / "texts.jsonl").write_text(json.dumps({"user_id": "u", "input": "x", "output": "y"}))
    out = tmp_path / "out"
    program = (
        "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__'); "
        "assert 'ray' not in sys.modules and 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", program, JOB, "jsonl", "--input", tmp_path / "texts.jsonl", "--out", out]
    subprocess.run(command, check=True, capture_output=True)
    assert artifacts.open_artifact(out, schema.TEXT_CORPUS).summary["users"] == 1


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path):
    """10 and 110 MB: reading the file whole would add several times the difference."""
    peaks = []
    for megabytes in (10, 110):
        folder = tmp_path / str(megabytes)
        folder.mkdir()
        questions, outputs, people = write_large(folder, megabytes)
        arguments = ["--questions", questions, "--outputs", outputs, "--task", "LaMP_4", "--out", folder / "out"]
        program = (
            "import resource, runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__'); "
            "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        command = [sys.executable, "-c", program, JOB, "lamp", *arguments, "--buckets", "64"]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        assert f"users: {people}" in printed
        peaks.append(int(printed.rpartition("peak ")[2]) / 1024)
    assert peaks[1] < peaks[0] + 100, peaks
