"""What `ray job submit` sends of this checkout: small, and complete."""

import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
import yaml

from pages import outputs

ROOT = Path(__file__).resolve().parents[1]
LARGEST = 5 * 2**20


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def documented() -> list[str]:
    """A file in each folder that a command of the README or of docs/ makes."""
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    return sorted({f"{folder}/made.bin" for page in pages for folder in outputs(page.read_text())})


def package(folder: Path, target: Path, gitignore: bool = True) -> zipfile.ZipFile:
    """The package that Ray makes of a working_dir."""
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package

    excludes = get_runtime_env_default_excludes()
    create_package(str(folder), target, include_gitignore=gitignore, excludes=excludes)
    return zipfile.ZipFile(target)


def test_the_package_is_small_and_has_what_jobs_need_and_nothing_that_they_made(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    for name in tracked():
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, checkout / name)
    made = [
        *documented(),
        "runs/a/head/model.safetensors",
        "corpora/a/items/part-00000.parquet",
        "results/a/report/report.md",
        "parts/scenes/vision/model.safetensors",
        ".venv/lib/python3.11/site-packages/torch/lib.so",
        ".mypy_cache/a.json",
        ".pytest_cache/a",
        ".hypothesis/a",
        "platform/palate.egg-info/PKG-INFO",
        "platform/palate/__pycache__/config.cpython-311.pyc",
        "model.gguf",
    ]
    for name in made:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_bytes(b"made")
    with package(checkout, tmp_path / "package.zip") as sent:
        names = {info.filename for info in sent.infolist() if not info.is_dir()}
    assert (tmp_path / "package.zip").stat().st_size < LARGEST
    assert names.isdisjoint(made)
    needed = {name for name in tracked() if name.split("/")[0] in ("platform", "jobs", "serve", "tune")}
    assert needed - names == set()
    assert "pyproject.toml" in names
    assert not [name for name in names if name.startswith(("docs/", "tests/", ".git/"))]


def test_what_documented_commands_make_is_neither_sent_nor_copied_to_machines(tmp_path: Path) -> None:
    """By each list alone: ``ray job submit`` reads both, and ``ray up`` copies what .gitignore leaves."""
    made = documented()
    assert {"runs", "corpora", "sweeps", "lists", "claims", "parts"} <= {name.split("/")[0] for name in made}
    for name in [*made, "jobs/kept.py"]:
        (tmp_path / "checkout" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "checkout" / name).write_bytes(b"made")
    for listed in (".rayignore", ".gitignore"):
        # Ray reads a .rayignore whatever is asked for; so the other list is put in its place.
        shutil.copy(ROOT / listed, tmp_path / "checkout" / ".rayignore")
        with package(tmp_path / "checkout", tmp_path / f"{listed}.zip", gitignore=False) as sent:
            found = {info.filename for info in sent.infolist() if not info.is_dir()}
        assert found - {".rayignore"} == {"jobs/kept.py"}, listed
    cluster = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    assert cluster["rsync_filter"] == [".gitignore"]


def test_this_checkout_is_small_as_it_lies_here(tmp_path: Path) -> None:
    with package(ROOT, tmp_path / "package.zip") as sent:
        largest = max(sent.infolist(), key=lambda info: info.file_size)
    size = (tmp_path / "package.zip").stat().st_size
    assert size < LARGEST, f"{size / 2**20:.1f} MiB, of which {largest.filename} is the largest: add it to .rayignore"


def test_the_runtime_environment_sends_the_checkout_and_finds_the_library_in_it() -> None:
    environment = yaml.safe_load((ROOT / "jobs" / "runtime_env.yaml").read_text())
    assert environment["working_dir"] == "."
    assert environment["env_vars"]["PYTHONPATH"] == "platform"
