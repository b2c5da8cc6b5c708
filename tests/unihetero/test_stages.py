"""From shards to a model that transformers loads: the whole path in small, stages, mixtures, refusals."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModel, AutoProcessor

from palate import artifacts
from palate.artifacts import ArtifactMismatch
from palate.training import logging as run_logs
from palate.training.parallel import World
from palate.unihetero.samples import collate
from palate.unihetero.stages import TrainConfig, pipeline, start_over
from palate.unihetero.training import PretrainConfig
from toy_unihetero import build_parts


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return build_parts(tmp_path_factory.mktemp("parts"))


def config(parts, out, **others):
    train = PretrainConfig(steps=4, batch=4, micro_batch=2, checkpoint_every=2, read_ahead=0)
    given = {
        "corpus": (f"{parts}/index",),
        "language": f"{parts}/language",
        "vision": f"{parts}/vision",
        "train": train,
    }
    return TrainConfig(out=str(out), cache=f"{parts}/cache", **(given | others))


def run(settings):
    start_over(settings)
    return pipeline(settings, World())


def test_the_whole_path(parts, tmp_path):
    settings = config(parts, tmp_path / "run")
    made = run(settings)
    model, report = AutoModel.from_pretrained(made.local_folder(), output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    processor = AutoProcessor.from_pretrained(made.local_folder())
    rows = run_logs.read(tmp_path / "run" / "training")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all({"text_loss", "semantic_loss"} <= row["metrics"].keys() for row in rows)
    # What was written is what was trained, and what was frozen is as it was.
    frozen = AutoModel.from_pretrained(parts / "vision", add_pooling_layer=False).state_dict()
    assert all(torch.equal(frozen[key], value) for key, value in model.vision.state_dict().items())
    image = torch.rand(3, 32, 32).numpy()
    given = processor(images=[image], text=["<image> Question: what is at b3 Answer:"])
    assert model.eval()(**given).logits.isfinite().all()
    # Again: nothing to do.
    assert pipeline(settings, World()).created == made.created


def test_stages_follow_one_another(parts, tmp_path):
    first = config(parts, tmp_path / "warm-up")
    first = replace(first, train=replace(first.train, stage="projector"))
    warm = AutoModel.from_pretrained(run(first).local_folder())
    language = AutoModel.from_pretrained(parts / "language").state_dict()
    decoder = warm.decoder.state_dict()
    assert all(torch.equal(decoder[key], language[key]) for key in language if "embed_tokens" not in key)
    second = config(parts, tmp_path / "joint", start=str(tmp_path / "warm-up"), arm="decoder", vae=f"{parts}/vae")
    joint = AutoModel.from_pretrained(run(second).local_folder())
    third = replace(
        second, out=str(tmp_path / "pixels"), start=second.out, train=replace(second.train, stage="pixels", steps=2)
    )
    pixels = AutoModel.from_pretrained(run(third).local_folder())
    before, after = joint.state_dict(), pixels.state_dict()
    changed = {key.partition(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"pixel_head"}


def test_another_setting_is_refused_by_name(parts, tmp_path):
    settings = config(parts, tmp_path / "run")
    run(settings)
    with pytest.raises(ArtifactMismatch, match="text_first"):
        pipeline(replace(settings, text_first=0.5), World())
    run(replace(settings, text_first=0.5, fresh=True))


def test_packs_and_mixtures(parts, tmp_path):
    settings = config(
        parts, tmp_path / "run", corpus=(f"{parts}/index", f"{parts}/index"), weights=(0.75, 0.25), pack=300
    )
    run(settings)
    rows = run_logs.read(tmp_path / "run" / "training")
    assert all(row["groups"]["language"]["total"] == 4 for row in rows)  # packs
    assert sum(row["tokens_per_second"] > 0 for row in rows) == 4


def test_corrupt_samples_are_left_out_and_named(parts, tmp_path):
    settings = config(parts, tmp_path / "run", longest=60)
    settings = replace(settings, train=replace(settings.train, steps=6))
    run(settings)
    ledger = [json.loads(line) for line in (tmp_path / "run" / "training" / "corrupt.jsonl").read_text().splitlines()]
    assert ledger
    assert all("more than --longest 60" in row["reason"] for row in ledger)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"arm": "decoder"}, "--vae goes with the arms pixel and decoder"),
        ({"weights": (0.5, 0.5)}, "--weights has 2 shares for 1 corpora"),
        ({"text_first": 1.5}, "a share from 0 to 1"),
    ],
)
def test_settings_that_do_not_go_together(parts, tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        config(parts, tmp_path, **values)


def test_a_vision_encoder_that_is_not_there(parts, tmp_path):
    with pytest.raises(ValueError, match=r"--vision .*nowhere cannot be loaded"):
        run(config(parts, tmp_path / "run", vision=f"{parts}/nowhere"))


def test_collate_of_the_source_has_pixels(parts, tmp_path):
    from palate.unihetero.stages import load_parts, stream_of

    settings = config(parts, tmp_path / "run")
    index = artifacts.open_artifact(settings.corpus[0])
    stream = stream_of(settings, [index], load_parts(settings, "cpu").processor)
    units, _ = stream.plan(stream.start())
    batch = collate([[stream.load(unit).value] for unit in units])
    assert batch.pixel_values.shape == (4, 3, 32, 32)
    assert float(batch.pixel_values.abs().max()) <= 1.0
