"""From shards to a model that transformers loads: the whole path in small, stages, mixtures, refusals."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoProcessor

from palate import artifacts
from palate.artifacts import ArtifactMismatch
from palate.corpora.captions import RawSample
from palate.corpora.worlds.shapes import encode_png
from palate.training import logging as run_logs
from palate.training.parallel import World
from palate.unihetero.samples import Sample, Segment, collate, shortened, split
from palate.unihetero.sources import Decode
from palate.unihetero.stages import TrainConfig, load_parts, pipeline, start_over, stream_of
from palate.unihetero.training import PretrainConfig
from toy_unihetero import build_parts


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return build_parts(tmp_path_factory.mktemp("parts"))


def config(parts, out, **others):
    train = PretrainConfig(steps=4, batch=4, micro_batch=2, checkpoint_every=2, read_ahead=0)
    given = {"corpus": (f"{parts}/index",), "train": train}
    if "start" not in others:
        given |= {"language": f"{parts}/language", "vision": f"{parts}/vision"}
    return TrainConfig(out=str(out), cache=f"{parts}/cache", **(given | others))


def made_processor(parts):
    """A folder with a processor."""
    made = load_parts(config(parts, "unused"), "cpu").processor
    made.save_pretrained(parts / "processor")
    return parts / "processor"


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


def test_a_target_begins_as_the_projector_that_was_trained(parts, tmp_path):
    first = config(parts, tmp_path / "text", arm="understanding")
    run(first)
    begun = load_parts(config(parts, tmp_path / "next", start=first.out), "cpu").model
    trained = AutoModel.from_pretrained(tmp_path / "text" / "model").projector.state_dict()
    for key, value in begun.target_projector.state_dict().items():
        assert torch.equal(value, trained[key])
        assert torch.equal(value, begun.projector.state_dict()[key])


def test_a_run_may_end_with_the_average_of_its_weights(parts, tmp_path):
    settings = config(parts, tmp_path / "last")
    averaged = replace(settings, out=f"{tmp_path}/average", train=replace(settings.train, average=6.94))
    last, mean = (AutoModel.from_pretrained(run(one).local_folder()).state_dict() for one in (settings, averaged))
    assert not torch.equal(last["projector.up.weight"], mean["projector.up.weight"])
    assert torch.equal(last["vision.layernorm.weight"], mean["vision.layernorm.weight"])


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


def test_what_cannot_be_used_is_left_out_and_named(parts, tmp_path):
    settings = config(parts, tmp_path / "run", longest=20)  # no caption before an image fits
    settings = replace(settings, train=replace(settings.train, steps=6))
    run(settings)
    ledger = [json.loads(line) for line in (tmp_path / "run" / "training" / "corrupt.jsonl").read_text().splitlines()]
    assert ledger
    assert all("tokens up to the end of the image, of at most 20" in row["reason"] for row in ledger)


def test_longer_samples_are_cut():
    segments = (Segment.answered([5], [6, 7, 8]), Segment.answered([5], [9]))
    sample = Sample("a", (1, 2, 3), segments, None)
    assert shortened(sample, 8).segments == segments[:1]
    assert shortened(sample, 6).segments == (Segment((5, 6, 7), (-100, 6, 7)),)
    assert shortened(sample, 3).segments == ()
    with pytest.raises(ValueError, match="3 tokens up to the end of the image, of at most 2"):
        shortened(sample, 2)


def test_packs_that_turn_out_too_long_become_several_rows():
    samples = [Sample(str(n), tuple(range(n)), (), None) for n in (3, 4, 9, 2)]
    assert [[one.id for one in row] for row in split(samples, 8)] == [["3", "4"], ["9"], ["2"]]
    assert len(split(samples, None)) == 1


@pytest.mark.parametrize(
    "record", [{"conversations": [{"value": "x"}]}, {"conversations": ["a"]}, {"questions": [{"q": 1}]}]
)
def test_records_that_are_not_understood_are_corrupt_samples(parts, record):
    processor = AutoProcessor.from_pretrained(made_processor(parts))
    image = encode_png(np.zeros((3, 8, 8)))
    with pytest.raises(ValueError, match="a record that is not understood"):
        Decode(processor)(RawSample("k", image, "a red circle at b2", record), 0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"arm": "decoder"}, "--vae goes with the arms pixel and decoder"),
        ({"weights": (0.5, 0.5)}, "--weights has 2 shares for 1 corpora"),
        ({"text_first": 1.5}, "a share from 0 to 1"),
        ({"arm": "shuffled"}, "a control of the experiment"),
        ({"arm": "curriculum", "train": PretrainConfig(stage="projector")}, "--stage projector learns from text"),
        ({"start": "run", "image_tokens": 4, "merge": "concatenate"}, "leave out --image-tokens, --merge"),
    ],
)
def test_settings_that_do_not_go_together(parts, tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        config(parts, tmp_path, **values)


def test_a_vision_encoder_that_is_not_there(parts, tmp_path):
    with pytest.raises(ValueError, match=r"--vision .*nowhere cannot be loaded"):
        run(config(parts, tmp_path / "run", vision=f"{parts}/nowhere"))


def test_collate_of_the_source_has_pixels(parts, tmp_path):
    settings = config(parts, tmp_path / "run")
    index = artifacts.open_artifact(settings.corpus[0])
    stream = stream_of(settings, [index], load_parts(settings, "cpu").processor)
    units, _ = stream.plan(stream.start())
    batch = collate([[stream.load(unit).value] for unit in units])
    assert batch.pixel_values.shape == (4, 3, 32, 32)
    assert float(batch.pixel_values.abs().max()) <= 1.0
