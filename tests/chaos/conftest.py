"""What all tests of faults begin with: chance that can be drawn again, and the inputs of the three pipelines."""

import random
from pathlib import Path

import pytest

from faulted import SEED
from toy_pipelines import build_inputs


@pytest.fixture
def chance(request: pytest.FixtureRequest) -> random.Random:
    """What a test draws from; its seed is shown where the test fails."""
    seed = f"{SEED} {request.node.name}"
    print(f"drawn from {seed!r}; PALATE_CHAOS_SEED=N draws others")
    return random.Random(seed)


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_inputs(tmp_path_factory.mktemp("inputs"))
