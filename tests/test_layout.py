"""The repository's shape, as far as breaking it breaks something else: packages, Ray's place, no pickle, `platform`."""

import ast
import itertools
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "platform" / "palate"
JOBS = sorted((ROOT / "jobs").glob("*.py"))
SOURCES = sorted(
    path for folder in ("platform", "jobs", "serve", "tune", "benchmarks") for path in (ROOT / folder).rglob("*.py")
)
# The name is put together here, because a test below looks for it everywhere.
PICKLE = "pick" + "le"
WITHOUT_RAY = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name == "ray" or name.startswith("ray."):
            raise ImportError(f"{name} is blocked: only palate.distributed, serve and tune may import it")

sys.meta_path.insert(0, Block())
"""


def imports(tree: ast.AST) -> Iterator[tuple[str, int, bool]]:
    """Every imported module in a syntax tree with its line and whether the statement stands inside a function."""

    def walk(node: ast.AST, inside: bool) -> Iterator[tuple[str, int, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, child.lineno, inside) for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.module and child.level == 0:
                yield from ((f"{child.module}.{alias.name}", child.lineno, inside) for alias in child.names)
            function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from walk(child, inside or function)

    yield from walk(tree, False)


def is_ray(name: str) -> bool:
    return name == "ray" or name.startswith("ray.")


def test_folders_that_must_not_be_packages_are_none():
    """A platform/__init__.py would shadow the standard library's `platform` and break Ray on every worker."""
    for folder in ("platform", "jobs", "serve", "tune", "tests", "benchmarks"):
        assert not (ROOT / folder / "__init__.py").exists(), folder
    for path in (ROOT / "tests").rglob("__init__.py"):
        raise AssertionError(f"{path}: tests are imported by file, not as packages")


def test_every_folder_of_the_library_is_a_package():
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_ray_is_imported_only_where_it_may_be(path):
    place = path.relative_to(ROOT)
    if place.parts[0] in ("serve", "tune") or place.parts[:3] == ("platform", "palate", "distributed"):
        return
    for name, line, inside in imports(ast.parse(path.read_text())):
        script = place.parts[0] in ("jobs", "benchmarks")
        # palate.distributed.launch imports ray only for --launcher ray; that jobs do without it is tested below.
        allowed = script and (inside or not is_ray(name))
        assert allowed or not (is_ray(name) or name.startswith("palate.distributed")), f"{place}:{line} imports {name}"


def test_the_import_check_would_catch_each_way_of_importing_ray():
    found = list(
        imports(ast.parse("import ray.data as d\nfrom ray import train\ndef f():\n    import ray\nimport raytracer"))
    )
    assert [(name, inside) for name, _, inside in found if is_ray(name)] == [
        ("ray.data", False),
        ("ray.train", False),
        ("ray", True),
    ]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_reads_or_writes_python_objects_as_bytes(path):
    forbidden = {PICKLE, f"c{PICKLE}", "dill", "cloud" + PICKLE, "job" + "lib", "shelve", "marshal"}
    tree = ast.parse(path.read_text())
    for name, line, _ in imports(tree):
        assert not forbidden & set(name.split(".")), f"{path}:{line} imports {name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            call = ast.unparse(node.func)
            assert call not in ("torch.load", "torch.save"), f"{path}:{node.lineno} calls {call}"
            keywords = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
            assert not keywords.get("allow_" + PICKLE), f"{path}:{node.lineno} allows it"


def test_every_library_that_is_imported_is_declared():
    """What only happens to be there because another dependency needs it, can leave with that dependency."""
    called = {
        "sklearn": "scikit-learn",
        "rouge_score": "rouge-score",
        "prometheus_client": "prometheus-client",
        "PIL": "pillow",
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    declared = {re.split(r"[\[<>=~! ]", line)[0] for line in lines} | {"palate"}
    for path in SOURCES:
        for name, line, _ in imports(ast.parse(path.read_text())):
            top = name.split(".")[0]
            beside = (path.parent / f"{top}.py").is_file() or (top == path.parent.name and "." in name)
            known = beside or top in sys.stdlib_module_names or called.get(top, top) in declared
            assert known, f"{path.relative_to(ROOT)}:{line} imports {top}, which pyproject.toml does not name"


def test_every_dependency_has_its_reason_written_down():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    reasons = (ROOT / "docs" / "dependencies.md").read_text()
    missing = [name for name in (re.split(r"[\[<>=~! ]", line)[0] for line in lines) if f"| {name} |" not in reasons]
    assert missing == []


def test_no_file_names_this_machine_or_a_registry():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    pattern = re.compile(r"/wor[k]/|/roo[t]/|\.\./share[d]|pyp[i]\.org|pythonhoste[d]")
    for name in tracked.stdout.splitlines():
        path = ROOT / name
        if path.suffix in {".py", ".md", ".toml", ".yaml", ".json", ".txt", ""} and path.is_file():
            if path == Path(__file__).resolve():
                continue
            found = pattern.search(path.read_text(errors="replace"))
            assert found is None, f"{name} holds {found.group() if found else ''!r}"


def modules_without_ray() -> list[str]:
    names = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        if parts[1:2] != ("distributed",):
            names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


def run(code: str, *arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=cwd, env=settings, capture_output=True, text=True, check=False, timeout=300)


# Seconds to import, and needed by few calls.
WHERE_USED = {"matplotlib", "nltk", "pandas", "sklearn"}


def test_the_library_imports_and_every_job_shows_its_help_without_ray():
    """In one process, because importing torch and transformers is what takes the time."""
    code = f"""
{WITHOUT_RAY}
import importlib, runpy

for name in {modules_without_ray()!r}:
    importlib.import_module(name)
for job in {[str(path) for path in JOBS]!r}:
    sys.argv = [job, "--help"]
    try:
        runpy.run_path(job, run_name="__main__")
    except SystemExit as end:
        assert end.code == 0, (job, end.code)
    else:
        raise AssertionError(f"{{job}} --help did not end the program")
assert not [name for name in sys.modules if name.split(".")[0] == "ray"]
assert not {WHERE_USED!r} & sys.modules.keys(), "imported where it is used: every worker and every --help waits for it"
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.lower().count("usage: ") == len(JOBS)


def test_every_job_is_submitted_to_a_cluster_by_a_test():
    """As README.md and docs/clusters.md say that it can be."""
    tests = (ROOT / "tests" / "distributed" / "test_jobs.py").read_text()
    submitted = re.findall(r'python"?,?\s+"?((?:jobs|tune)/\w+\.py)', tests)
    scripts = [*JOBS, *(ROOT / "tune").glob("*.py")]
    assert sorted(set(submitted)) == sorted(str(path.relative_to(ROOT)) for path in scripts)


# The standard library's `platform`, which a folder of that name at the root could hide


def test_platform_is_the_standard_librarys_here():
    import platform

    assert platform.system()
    assert Path(platform.__file__).parent == Path(os.__file__).parent


@pytest.mark.parametrize("start", [[str(Path(sys.executable).with_name("pytest"))], [sys.executable, "-m", "pytest"]])
def test_platform_survives_both_ways_of_starting_pytest(start):
    """`python -m pytest` puts the root on the path, bare `pytest` does not."""
    name = "test_platform_is_the_standard_librarys_here"
    command = [*start, "-q", "-p", "no:cacheprovider", f"tests/test_layout.py::{name}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


@pytest.mark.slow
def test_platform_survives_on_a_ray_worker_with_this_working_dir(tmp_path):
    """Ray puts the unpacked working_dir on its workers' path; a relative PYTHONPATH finds the library there."""
    code = """
import ray
ray.init(address="local", num_cpus=1, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False,
         runtime_env={"working_dir": ".", "excludes": ["runs", ".venv"], "env_vars": {"PYTHONPATH": "platform"}})

@ray.remote
def where():
    import os, platform, palate
    return platform.__file__, platform.system(), palate.__file__, os.getcwd()

found = ray.get(where.remote(), timeout=120)
print(*found, sep="\\n")
"""
    for _ in range(3):
        done = run(code, RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0", RAY_ADDRESS="")
        if "timed out during startup" not in done.stderr:  # Ray waits 30 s, which a busy machine may exceed
            break
    assert done.returncode == 0, done.stderr
    file, system, package, folder = done.stdout.splitlines()[-4:]
    assert Path(file).parent == Path(os.__file__).parent
    assert system
    assert Path(package).is_relative_to(folder)  # the copy that was sent, not an installed one
