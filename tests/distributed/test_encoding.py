"""Encoding by Ray Data's actors, against the plain loop."""

import pytest

import toy_lists
from palate import artifacts
from palate.corpora.preparation import Step
from palate.corpora.streams import CorpusError
from palate.lpo.encoding import EncodeConfig, encode

SETTINGS = EncodeConfig(resolution=16, latent_dtype="float32", encode_batch=8)


@pytest.fixture(scope="module")
def run_with_actors(ray_cluster):
    from palate.distributed.prepare import run_with_actors

    return run_with_actors


def test_actors_and_the_plain_loop_encode_alike(run_with_actors, tmp_path):
    lists = toy_lists.lists(tmp_path / "lists")
    plain = encode(lists, "shapes", str(tmp_path / "plain"), SETTINGS)
    remote = encode(lists, "shapes", str(tmp_path / "ray"), SETTINGS, run_with_actors)
    uids = [item["image_uid"] for number in range(24) for item in toy_lists.row(number, 2)["items"]]
    for uid in uids:
        assert (remote.latents(uid).mean == plain.latents(uid).mean).all()
    for caption in (*toy_lists.CAPTIONS, ""):
        assert (remote.text(caption).text - plain.text(caption).text).abs().max() < 1e-5


def test_a_corrupt_image_is_named_as_by_the_plain_loop(run_with_actors, tmp_path, monkeypatch):
    monkeypatch.setattr(toy_lists, "png", lambda *_: b"no image")
    lists = toy_lists.lists(tmp_path / "lists", count=6)
    with pytest.raises(CorpusError, match=r"image i\d-\d: not an image that can be decoded"):
        encode(lists, "shapes", str(tmp_path / "ray"), SETTINGS, run_with_actors)
    assert not artifacts.exists(tmp_path / "ray" / "index")


@pytest.mark.parametrize(
    ("tasks", "flags", "actors", "gpus"),
    [
        (9, {}, 2, 0),  # half of the test's four CPUs
        (1, {}, 1, 0),
        (9, {"at_least": 3}, 3, 0),
        (2, {"at_least": 3}, 2, 0),
        (9, {"gpu": True, "at_least": 2}, 2, 1),  # of a cluster that has none yet
    ],
)
def test_as_many_actors_as_there_are_machines_or_workers_asked_for(
    run_with_actors, monkeypatch, tasks, flags, actors, gpus
):
    from palate.distributed import prepare

    asked = []
    monkeypatch.setattr(prepare, "_run", lambda step, compute, gpus: asked.append((compute.min_size, gpus)))
    run_with_actors(Step("toy", dict, list(range(tasks))), **flags)
    assert asked == [(actors, gpus)]
