"""Scripts of ``jobs/`` and ``benchmarks/`` as modules, for tests of what is in them."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]


def load_script(place: str) -> ModuleType:
    """The script at ``place``, from the repository's root, without running its ``main``."""
    path = ROOT / place
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    assert spec
    assert spec.loader
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found  # dataclasses look their module up
    spec.loader.exec_module(found)
    return found
