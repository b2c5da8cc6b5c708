"""The dashboard asks for metrics that exist."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

from sqlalchemy import text

from palate.serving.image_http import ImageMetrics
from palate.serving.metrics import Metrics
from palate.users.records import Ranking
from palate.users.store import open_store

OPERATIONS = Path(__file__).resolve().parents[1] / "docs" / "operations"


def exported() -> set[str]:
    """The names of all samples that servers of text and images show."""
    load = SimpleNamespace(running=1, waiting=2, jobs=3)
    hosted = SimpleNamespace(name="a", worker=SimpleNamespace(load=load))
    cache = SimpleNamespace(counts=lambda: SimpleNamespace(hits=1, misses=2))
    service = SimpleNamespace(all_hosted=[hosted], cache=cache, worker=SimpleNamespace(load=load))
    names = set()
    for metrics in (Metrics(service), ImageMetrics(service)):  # type: ignore[arg-type]
        metrics.request("/v1/models", 200)
        for line in metrics.render().decode().splitlines():
            if not line.startswith("#"):
                assert f'replica="{metrics.replica}"' in line
                names.add(re.match(r"\w+", line).group())
    return names


def test_the_page_asks_the_database_who_keeps_how_much(tmp_path):
    page = (OPERATIONS.parent / "operations.md").read_text()
    people, images = re.findall("^SELECT .*;$", page, re.MULTILINE)
    with open_store(f"sqlite:///{tmp_path}/palate.db") as store:
        for tenant, user in (("acme", "ann"), ("acme", "bob"), ("rival", "ann")):
            store.put_history(tenant, user, [])
        for number in range(2):
            store.add_ranking("acme", Ranking("ann", f"r-{number}", "p", ("a" * 64, str(number) * 64)), list)
        with store.read() as connection:
            assert connection.execute(text(people)).all() == [("acme", 2), ("rival", 1)]
            assert connection.execute(text(images)).all() == [("acme", 3)]


def test_the_dashboard_and_its_page_ask_for_metrics_that_exist():
    board = json.loads((OPERATIONS / "grafana.json").read_text())
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    used = {name for expression in asked for name in re.findall(r"palate_\w+", expression)}
    assert len(used) >= 12
    assert used <= exported()
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    page = (OPERATIONS.parent / "operations.md").read_text()
    documented = set(re.findall(r"palate_[a-z_]+", page))
    bases = {re.sub(r"_(total|bucket|sum|count|created)$", "", name) for name in exported()}
    assert {re.sub(r"_total$", "", name) for name in documented} <= bases
    assert {base for base in bases if base not in {re.sub(r"_total$", "", name) for name in documented}} == set()
