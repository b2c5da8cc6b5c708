"""Multiple choice by likelihood: what is scored, what is compared, what is kept."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessor

from palate import artifacts
from palate.corpora.questions import Choice, write_tsv
from palate.corpora.worlds.shapes import encode_png
from palate.evaluation.vision import VisionConfig, make_report
from palate.unihetero.phrasing import add_image_tokens
from palate.unihetero.processing import UniHeteroProcessor
from palate.unihetero.samples import Sample, collate
from palate.unihetero.scoring import Asked, choose, correct, text_loss
from palate.unihetero.stages import KIND
from toy_unihetero import PLACES, model, phrasing, tokenizer

ASKED = [
    Asked("what is it", ("circle", "square"), 0),
    Asked("where is it", ("left", "right", "red circle left"), 1),  # options of several tokens
]


def features(count=3):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, PLACES, 24, generator=generator) for _ in range(count)]


def test_likelihoods_equal_those_of_the_plain_model():
    network, said, images = model("embedding").eval(), phrasing(), features()
    found = choose(network, said, images, [ASKED] * 3, encoded=True, batch=2)
    for image, scores in zip(images, found, strict=True):
        for one, values in zip(ASKED, scores, strict=True):
            for option, value in zip(one.options, values, strict=True):
                given, answer = [*said.image(), *said.asked(one.question)], [*said.ids(option), said.end]
                several = any(len(said.ids(other)) > 1 for other in one.options)
                ids = torch.tensor([[*given, *answer]])
                logits = network(input_ids=ids, image_features=image).logits.detach().log_softmax(-1)[0]
                told = answer if several else answer[:1]
                expected = sum(float(logits[len(given) - 1 + place, token]) for place, token in enumerate(told))
                assert value == pytest.approx(expected, abs=1e-4)


def test_a_tie_is_wrong():
    asked = [[Asked("q", ("a", "b", "c"), 1)] * 3]
    assert correct([[[0.0, 1.0, 0.5], [1.0, 1.0, 0.0], [2.0, 1.0, 0.0]]], asked) == [[True, False, False]]


def test_text_loss_equals_the_plain_model():
    network, said = model().eval(), phrasing()
    sample = Sample("a", (), (said.caption("a red circle"), said.caption("a blue square left")), None)
    total = count = 0.0
    for segment in sample.segments:
        logits = network(input_ids=torch.tensor([segment.ids])).logits.detach()[0].log_softmax(-1)
        for place, label in enumerate(segment.labels):
            if label >= 0:
                total, count = total - float(logits[place - 1, label]), count + 1
    assert text_loss(network, [sample]) == pytest.approx(total / count, rel=1e-5)
    assert collate([[sample]]).pixel_values is None


@pytest.fixture
def runs(tmp_path):
    """Two models, as runs hold them."""
    known = tokenizer()
    add_image_tokens(known)
    size = {"height": 16, "width": 16}
    images = ViTImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    for name, seed in (("base", 0), ("tuned", 1)):

        def produce(writer, seed=seed):
            model("embedding", seed=seed).save_pretrained(writer.folder)
            UniHeteroProcessor(images, known, image_tokens=PLACES).save_pretrained(writer.folder)

        artifacts.ensure(f"{tmp_path}/{name}/model", produce, kind=KIND, config={})
    return [f"{name}={tmp_path}/{name}" for name in ("base", "tuned")]


@pytest.fixture
def questions(tmp_path):
    generator = np.random.default_rng(0)
    rows = []
    for number in range(6):
        image = encode_png(generator.random((3, 20, 24)))
        rows.append(Choice(f"{number}a", image, "what is it", "", ("circle", "square"), number % 2, "what"))
        rows.append(Choice(f"{number}b", image, "where is it", "", ("left", "right", "it"), number % 3, "where"))
    write_tsv(f"{tmp_path}/Toy.tsv", rows)
    return f"{tmp_path}/Toy.tsv"


def test_a_report_of_two_models(runs, questions, tmp_path):
    (tmp_path / "texts.txt").write_text("a red circle\n\na blue square left\n")
    config = VisionConfig(
        run=tuple(runs),
        out=f"{tmp_path}/report",
        questions=(questions,),
        texts=f"{tmp_path}/texts.txt",
        resamples=200,
    )
    made = make_report(config)
    metrics = json.loads((tmp_path / "report" / "report.json").read_text())["metrics"]
    answers = [json.loads(line) for line in (tmp_path / "report" / "answers-tuned.jsonl").read_text().splitlines()]
    assert len(answers) == 12
    assert metrics["Toy/tuned"]["value"] == pytest.approx(np.mean([answer["right"] for answer in answers]))
    where = [answer["right"] for answer in answers if answer["category"] == "where"]
    assert metrics["Toy: where/tuned"]["value"] == pytest.approx(np.mean(where))
    assert {answer["image"] for answer in answers} == set(range(6))  # two questions on each image
    assert metrics["Toy/tuned - base"]["n"] == 6
    assert {"text loss/tuned", "text loss/tuned - base"} <= metrics.keys()
    assert make_report(config).created == made.created


def test_what_cannot_be_evaluated(runs, questions, tmp_path):
    with pytest.raises(ValueError, match="nothing to evaluate on"):
        VisionConfig(run=tuple(runs), out=f"{tmp_path}/r")
    with pytest.raises(ValueError, match="two models called 'base'"):
        make_report(VisionConfig(run=(runs[0], runs[0]), out=f"{tmp_path}/r", questions=(questions,)))
    with pytest.raises(artifacts.ArtifactMissing):
        make_report(VisionConfig(run=(f"{tmp_path}/nowhere",), out=f"{tmp_path}/r", questions=(questions,)))


def test_images_of_any_mode_are_read(runs, tmp_path):
    import io

    rows = []
    for number, (mode, size) in enumerate((("CMYK", (9, 7)), ("RGB", (1, 1)), ("LA", (5, 5)))):
        stream = io.BytesIO()
        Image.new(mode, size).save(stream, "JPEG" if mode == "CMYK" else "PNG")
        rows.append(Choice(str(number), stream.getvalue(), "what is it", "", ("circle", "square"), 0))
    write_tsv(f"{tmp_path}/Modes.tsv", rows)
    config = VisionConfig(run=(runs[0],), out=f"{tmp_path}/r", questions=(f"{tmp_path}/Modes.tsv",), resamples=10)
    make_report(config)
    assert len((tmp_path / "r" / "answers-base.jsonl").read_text().splitlines()) == 3
