"""The loop for images: rankings over HTTP become lists, and a generator is tuned on them."""

import base64
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from fastapi.testclient import TestClient

import tiny_diffusion
import toy_lists
from palate.artifacts import Artifact, ArtifactMismatch
from palate.corpora.pictures import decode_image, read_images
from palate.corpora.streams import CorpusError
from palate.lpo.encoding import EncodeConfig
from palate.lpo.newcomers import NewcomersConfig, add_people
from palate.lpo.personal import load_people
from palate.lpo.sampling import SampleConfig
from palate.lpo.stages import LpoConfig, PersonalConfig, pipeline
from palate.lpo.training import ObjectiveConfig, TuneConfig
from palate.serving.image_http import create_image_app
from palate.serving.image_service import ImageService
from palate.training.parallel import World
from palate.users.images import png_of
from palate.users.keys import create_key
from palate.users.preparation import FeedbackConfig, prepare
from scripts import load_script
from toy_images import settings

CAPTIONS = ("a small red circle on black", "a large blue square", "the red square", "a blue circle on black")
ROOT = Path(__file__).parents[2]


def pictures(number: int, count: int) -> list[bytes]:
    """Redder ones first."""
    return [toy_lists.png(1 - place / count, 100 * number + place, tiny_diffusion.SIDE) for place in range(count)]


def post(client: TestClient, user: str, caption: str, images: list[bytes], **changes: Any) -> None:
    sent = [{"b64_json": base64.b64encode(image).decode()} for image in images]
    answer = client.post("/v1/feedback", json={"user": user, "prompt": caption, "images": sent, **changes})
    assert answer.status_code == 201, answer.text


@pytest.fixture
def service(tmp_path: Path) -> Iterator[ImageService]:
    made = ImageService(settings(tmp_path, feedback=f"{tmp_path}/feedback"))
    yield made
    made.stop()


@pytest.fixture
def client(service: ImageService) -> TestClient:
    key = create_key(service.store, "acme", "tests")
    return TestClient(create_image_app(service), headers={"Authorization": f"Bearer {key}"})


@pytest.fixture
def ranked(client: TestClient) -> dict[str, list[bytes]]:
    """Two people's rankings of three to five images of each caption, by id; bob likes them the other way round."""
    made = {}
    for number, caption in enumerate(CAPTIONS):
        images = pictures(number, 3 + number % 3)
        for user, order in (("ann", images), ("bob", images[::-1])):
            made[f"{user}-{number}"] = order
            post(client, user, caption, order, id=f"{user}-{number}")
    return made


def config(tmp_path: Path, out: str = "lists", **changes: Any) -> FeedbackConfig:
    given = {"validation": 0.0, "test": 0.0, "group_by": "caption-user", **changes}
    where = {"database": f"sqlite:///{tmp_path}/palate.db", "images": f"{tmp_path}/feedback"}
    return FeedbackConfig(out=str(tmp_path / out), tenant="acme", **where, **given)


def rows(lists: Artifact) -> list[dict[str, Any]]:
    return [row for path in lists.paths("lists/") for row in pq.read_table(lists.local(path)).to_pylist()]


def digests(images: list[bytes]) -> list[str]:
    return [png_of(decode_image(image))[0] for image in images]


@pytest.mark.usefixtures("client")
def test_lists_are_what_people_ranked(tmp_path: Path, ranked: dict[str, list[bytes]]) -> None:
    lists = prepare(config(tmp_path))
    found = {(row["user_id"], row["caption"]): row for row in rows(lists)}
    assert len(found) == 2 * len(CAPTIONS)
    for name, images in ranked.items():
        user, number = name.split("-")
        row = found[user, CAPTIONS[int(number)]]
        assert [item["image_uid"] for item in row["items"]] == digests(images)
        assert {source for edge in row["edges"] for source in edge["source_ids"]} == {name}
    image = ranked["ann-0"][0]
    (uid,) = digests([image])
    kept = decode_image(read_images(lists, {uid})[uid])
    assert (np.asarray(kept) == np.asarray(decode_image(image))).all()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("lists")) == ["lists"]


@pytest.mark.usefixtures("ranked")
def test_votes_of_all_meet_where_people_are_not_kept_apart(tmp_path: Path, client: TestClient) -> None:
    post(client, "cat", CAPTIONS[0], pictures(0, 3))
    lists = prepare(config(tmp_path, group_by="caption"))
    assert {row["user_id"] for row in rows(lists)} == {None}
    (row,) = (row for row in rows(lists) if row["caption"] == CAPTIONS[0])
    assert [item["image_uid"] for item in row["items"]] == digests(pictures(0, 3))  # ann and cat against bob
    assert lists.summary["tied_pairs"] > 0  # ann against bob


@pytest.mark.usefixtures("ranked")
def test_the_lists_depend_on_the_rankings_alone(tmp_path: Path, client: TestClient) -> None:
    lists = prepare(config(tmp_path))
    assert prepare(config(tmp_path)).created == lists.created  # reused
    assert prepare(config(tmp_path, out="again", buckets=3)).summary == lists.summary
    table = sorted(rows(lists), key=lambda row: row["list_id"])
    assert sorted(rows(prepare(config(tmp_path, out="third"))), key=lambda row: row["list_id"]) == table
    post(client, "ann", CAPTIONS[0], pictures(9, 2))
    with pytest.raises(ArtifactMismatch, match=r"'inputs\.input 0'"):
        prepare(config(tmp_path))
    assert prepare(config(tmp_path, fresh=True)).summary["records"] == lists.summary["records"] + 1


@pytest.mark.usefixtures("ranked")
def test_images_by_their_files(tmp_path: Path, service: ImageService) -> None:
    lists = prepare(config(tmp_path, keep="reference"))
    images = [row for path in lists.paths("images/") for row in pq.read_table(lists.local(path)).to_pylist()]
    assert all(row["bytes"] is None and Path(row["path"]).is_file() for row in images)
    assert service.delete_person("acme", "ann")
    assert all(Path(row["path"]).is_file() for row in images)  # bob ranked them, too
    assert {row["user_id"] for row in rows(prepare(config(tmp_path, out="later")))} == {"bob"}


@pytest.mark.usefixtures("ranked")
def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="--tenant other has no rankings"):
        prepare(FeedbackConfig(**{**vars(config(tmp_path)), "tenant": "other"}))
    with pytest.raises(CorpusError, match="an unknown image"):
        prepare(FeedbackConfig(**{**vars(config(tmp_path)), "images": str(tmp_path / "elsewhere")}))
    with pytest.raises(CorpusError, match="expected sqlite:///FILE"):
        prepare(FeedbackConfig(**{**vars(config(tmp_path)), "database": "mysql://x"}))
    assert not list(tmp_path.glob("*.jsonl"))


def tuning(lists: Artifact, out: Path, base: Path, **changes: Any) -> LpoConfig:
    return LpoConfig(
        lists=lists.url,
        out=str(out),
        model=str(base),
        encode=EncodeConfig(resolution=tiny_diffusion.SIDE, latent_dtype="float32"),
        learn=ObjectiveConfig(kl_beta=50.0),
        tune=TuneConfig(steps=2, batch=4, learning_rate=1e-3),
        sample=SampleConfig(sampler_steps=2),
        **changes,
    )


@pytest.mark.usefixtures("ranked")
def test_a_generator_is_tuned_on_the_rankings_and_a_newcomer_gets_a_vector(tmp_path: Path, client: TestClient) -> None:
    base = tiny_diffusion.save_tiny("sd", tmp_path)
    lists = prepare(config(tmp_path))
    tuned = pipeline(tuning(lists, tmp_path / "run", base, grid=0), World())
    assert tuned.paths("lora/")
    log = (tmp_path / "run" / "training").rglob("*.jsonl")
    assert any('"step": 2' in path.read_text() for path in log)

    personal = prepare(config(tmp_path, out="personal", examples=0.5))
    splits = {row["split"] for row in rows(personal)}
    assert splits == {"train", "examples"}
    changes = {"personal": PersonalConfig(personal="examples"), "grid": 0}
    run = pipeline(tuning(personal, tmp_path / "people", base, **changes), World())
    assert set(load_people(run.local_folder("person")).ids) == {"ann", "bob"}

    post(client, "cat", CAPTIONS[1], pictures(7, 4))
    later = prepare(config(tmp_path, out="later"))
    made = add_people(NewcomersConfig(run=str(tmp_path / "people"), lists=later.url, out=str(tmp_path / "more")))
    people = load_people(made.local_folder("person"))
    assert set(people.ids) == {"ann", "bob", "cat"}
    ann, bob, cat = (people.embeddings_UJ[people.places[user]] for user in ("ann", "bob", "cat"))
    assert (cat - ann).norm() < (cat - bob).norm()  # who likes red, as ann does


@pytest.mark.usefixtures("ranked")
def test_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    job = load_script("jobs/prepare.py")
    where = ["--database", f"sqlite:///{tmp_path}/palate.db", "--images", f"{tmp_path}/feedback", "--tenant", "acme"]
    given = ["prepare.py", "feedback", *where, "--group-by", "caption-user", "--out", str(tmp_path / "made")]
    monkeypatch.setattr(sys, "argv", given)
    job.main()
    assert "lists: 8" in capsys.readouterr().out
