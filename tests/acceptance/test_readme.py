"""The README's promises: what its ``bash`` fences say runs, in order, in one folder; what its others say exists.

The convention (docs/testing.md): a fence opened by ```` ```bash ```` is executed, any other is not. All of one page
share a fresh folder with links to ``jobs``, ``serve`` and ``tune``, and ``python`` is the one that runs the tests.
``--model smollm2`` is replaced by ``--model tiny``, so that the commands are tested and not the processor. A fence
opened by ```` ```sh ```` is executed from the repository's folder, against a cluster and a bucket that a test starts.
"""

import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from pages import PAGES, ROOT, commands, fences, outputs
from palate import artifacts
from toy_cluster import ray_head


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "HF_HUB_OFFLINE": "1",
    }


def bash(
    script: str, folder: Path, timeout: float, settings: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    command = ["bash", "-euo", "pipefail", "-c", script.replace("--model smollm2", "--model tiny")]
    settings = settings or environment()
    return subprocess.run(
        command, cwd=folder, env=settings, capture_output=True, text=True, check=False, timeout=timeout
    )


def test_fences_and_commands_are_found():
    first = "```bash\npython jobs/x.py \\\n  --out 'a b'  # why\n```\n"
    page = f"a\n{first}```text\npython jobs/y.py --in z\nls\n```\n```\nplain\n```\n"
    page += "```sh\nray job submit --no-wait -- python jobs/z.py --all\n```\n"
    assert [language for language, _ in fences(page)] == ["bash", "text", "", "sh"]
    found = [["python", "jobs/x.py", "--out", "a b"], ["python", "jobs/y.py", "--in", "z"]]
    assert commands(page) == [*found, ["python", "jobs/z.py", "--all"]]
    said = "`jobs/x.py --out a/b`, --out RUN, --out=c-d\n```text\npython jobs/y.py --out s3://bucket/e --in f\n```\n"
    assert outputs(said) == {"a/b", "c-d"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_names_exists(page):
    text = page.read_text()
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text)
    scripts = [words[1] for words in commands(text)]
    missing = [name for name in links if not (page.parent / name).exists()]
    missing += [name for name in scripts if not (ROOT / name).exists()]
    assert missing == []


# Shows the help of many commands in one process, because importing torch is what takes the time.
HELPS = """
import contextlib, io, json, runpy, sys

shown = {}
for command in json.loads(sys.argv[1]):
    sys.argv, output = [*command[1:], "--help"], io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        runpy.run_path(command[1], run_name="__main__")
    shown[" ".join(command)] = output.getvalue()
print(json.dumps(shown))
"""


@pytest.mark.slow
def test_every_flag_that_a_page_uses_is_one_of_the_commands():
    """For the commands that are not executed here, because they need data, hardware or time."""
    used = [(page.name, words) for page in PAGES for words in commands(page.read_text())]

    def start(words: list[str]) -> list[str]:
        return words[: 2 + (len(words) > 2 and not words[2].startswith("-"))]

    starts = sorted({tuple(start(words)) for _, words in used})
    command = [sys.executable, "-c", HELPS, json.dumps(starts)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr
    helps = json.loads(done.stdout.splitlines()[-1])
    for page, words in used:
        for flag in (word.split("=")[0] for word in words if word.startswith("--")):
            shown = re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", helps[" ".join(start(words))])
            assert shown, f"{page}: {shlex.join(words)}: there is no flag {flag}"


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page_run_as_they_stand(page, tmp_path):
    blocks = [content for language, content in fences(page.read_text()) if language == "bash"]
    if not blocks:
        pytest.skip("no bash fence")
    for folder in ("jobs", "serve", "tune"):
        if (ROOT / folder).is_dir():
            (tmp_path / folder).symlink_to(ROOT / folder)
    for block in blocks:
        done = bash(block, tmp_path, timeout=600)
        assert done.returncode == 0, f"{block}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        for words in commands(f"```bash\n{block}```\n"):
            for flag, value in itertools.pairwise(words):
                if flag == "--out":
                    assert (tmp_path / value).exists(), f"{shlex.join(words)} left no {value}"


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_commands_for_a_cluster_run_as_they_stand(s3_endpoint, tmp_path):
    blocks = [content for page in PAGES for language, content in fences(page.read_text()) if language == "sh"]
    assert blocks
    filesystem, bucket = artifacts.locate("s3://bucket")
    filesystem.mkdir(bucket)
    with ray_head(2, PALATE_CACHE=str(tmp_path)) as head:
        for block in blocks:
            done = bash(block, ROOT, timeout=1200, settings=head.environment)
            assert done.returncode == 0, f"{block}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    made = [
        value
        for block in blocks
        for words in commands(f"```sh\n{block}```\n")
        for flag, value in itertools.pairwise(words)
        if flag == "--out"
    ]
    assert len(made) >= 3
    assert [url for url in made if not filesystem.exists(artifacts.locate(url)[1])] == []
    assert artifacts.open_artifact("s3://bucket/results/personas/report").read_json("report.json")["metrics"]
