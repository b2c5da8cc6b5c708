"""Encoding by Ray Data's actors, against the plain loop."""

import pytest

import toy_lists
from palate import artifacts
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
