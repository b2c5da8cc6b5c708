"""Scorers on tiny real models, against computations of their own."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, Dinov2Config, Dinov2Model

from palate.evaluation import scorers
from palate.evaluation.prompts import Prompt
from palate.evaluation.scorers import Drawn, Scorer, ScorerConfig, ScorerError, load_clip
from palate.models.small_diffusion import text_config
from tiny_diffusion import tiny_clip_tokenizer

WIDTH, OUT, SIDE = 32, 24, 16


def picture(seed: int, side: int = 20) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8))


DRAWN = [
    Drawn(picture(0), Prompt("a red circle"), picture(5)),
    Drawn(picture(1), Prompt("a large blue square on black"), picture(6)),
    Drawn(picture(2), Prompt("make the circle red", caption="a red circle"), picture(2)),
]


def clip_model(projection: int = OUT) -> CLIPModel:
    vision = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = text_config(tiny_clip_tokenizer(), WIDTH, layers=2).to_dict()
    shape = {"image_size": SIDE, "patch_size": 8, "hidden_act": "gelu"}
    config = CLIPConfig(
        text_config={**text, "hidden_act": "gelu"}, vision_config={**vision, **shape}, projection_dim=projection
    )
    torch.manual_seed(0)
    model = CLIPModel(config).eval()
    with torch.no_grad():  # biases and norms begin as constants, which would hide a mix-up
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn(weight.shape))
    return model


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    clip_model().save_pretrained(folder)
    tiny_clip_tokenizer().save_pretrained(folder)
    size = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    CLIPImageProcessorPil(**size).save_pretrained(folder)
    return folder


def test_clip_and_pickscore_are_transformers_own(clip_folder: Path) -> None:
    model, tokenizer = clip_model(), tiny_clip_tokenizer()
    processor = CLIPImageProcessorPil.from_pretrained(clip_folder)
    expected = []
    for one in DRAWN:
        text = tokenizer([one.prompt.shown], return_tensors="pt")
        image = processor(images=[one.image], return_tensors="pt").pixel_values
        with torch.no_grad():  # one by one, by the model's own similarity
            logits = model(input_ids=text.input_ids, attention_mask=text.attention_mask, pixel_values=image)
        expected.append(float(logits.logits_per_image))
    config = ScorerConfig(clip=str(clip_folder), pickscore=str(clip_folder), score_batch=2)
    found = {one.name: one for one in scorers.scorers(config, None, [one.prompt for one in DRAWN])}
    assert set(found) == {"colourfulness", "clip", "pickscore"}
    assert found["pickscore"].score(DRAWN) == pytest.approx(expected, rel=1e-4)
    factor = model.logit_scale.exp().item()
    assert found["clip"].score(DRAWN) * factor == pytest.approx(expected, rel=1e-4)


class OpenClipBlock(nn.Module):
    """A block as open_clip has it, on torch's own attention."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(WIDTH, 64), "c_proj": nn.Linear(64, WIDTH)})

    def forward(self, states: Tensor, mask: Tensor | None) -> Tensor:
        normed = self.ln_1(states)
        states = states + self.attn(normed, normed, normed, need_weights=False, attn_mask=mask)[0]
        return states + self.mlp["c_proj"](nn.functional.gelu(self.mlp["c_fc"](self.ln_2(states))))


class OpenClip(nn.Module):
    """open_clip's CLIP with its names, written from its layout alone."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.token_embedding, self.ln_final = nn.Embedding(words, WIDTH), nn.LayerNorm(WIDTH)
        self.positional_embedding = nn.Parameter(torch.randn(16, WIDTH))
        self.text_projection = nn.Parameter(torch.randn(WIDTH, OUT))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList([OpenClipBlock(), OpenClipBlock()])})
        self.visual = nn.Module()
        self.visual.conv1 = nn.Conv2d(3, WIDTH, 8, stride=8, bias=False)
        self.visual.class_embedding = nn.Parameter(torch.randn(WIDTH))
        self.visual.positional_embedding = nn.Parameter(torch.randn(5, WIDTH))
        self.visual.ln_pre, self.visual.ln_post = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.visual.proj = nn.Parameter(torch.randn(WIDTH, OUT))
        self.visual.transformer = nn.ModuleDict({"resblocks": nn.ModuleList([OpenClipBlock(), OpenClipBlock()])})

    def image(self, pixels: Tensor) -> Tensor:
        visual: Any = self.visual
        patches = visual.conv1(pixels).flatten(2).transpose(1, 2)
        states = torch.cat([visual.class_embedding.expand(len(pixels), 1, -1), patches], 1)
        states = visual.ln_pre(states + visual.positional_embedding)
        for block in visual.transformer["resblocks"]:
            states = block(states, None)
        return visual.ln_post(states[:, 0]) @ visual.proj

    def text(self, ids: Tensor) -> Tensor:
        states = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
        mask = torch.full((ids.shape[1],) * 2, -torch.inf).triu(1)
        for block in self.transformer["resblocks"]:  # type: ignore[union-attr]
            states = block(states, mask)
        return self.ln_final(states)[0, -1] @ self.text_projection  # the end of the text, without padding


def test_hpsv2_reads_open_clips_weights(clip_folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    tokenizer = tiny_clip_tokenizer()
    theirs = OpenClip(len(tokenizer)).eval()
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.add_(0.1 * torch.randn(weight.shape))
    file = tmp_path / "hps.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in theirs.state_dict().items()}, file)
    processor = CLIPImageProcessorPil.from_pretrained(clip_folder)
    expected = []
    for one in DRAWN:
        with torch.no_grad():
            image = theirs.image(processor(images=[one.image], return_tensors="pt").pixel_values)[0]
            text = theirs.text(tokenizer([one.prompt.shown], return_tensors="pt").input_ids)
        expected.append(float(torch.cosine_similarity(image, text, dim=0)))
    config = ScorerConfig(hpsv2=str(file), hpsv2_clip=str(clip_folder))
    found = {one.name: one for one in scorers.scorers(config, None, [one.prompt for one in DRAWN])}
    assert found["hpsv2"].score(DRAWN) == pytest.approx(expected, abs=1e-5)


def test_the_aesthetics_head(clip_folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(2)
    layers = nn.Sequential(nn.Linear(OUT, 8), nn.Dropout(0.2), nn.Linear(8, 4), nn.Dropout(0.1), nn.Linear(4, 1)).eval()
    file = tmp_path / "head.safetensors"
    save_file({f"layers.{name}": tensor for name, tensor in layers.state_dict().items()}, file)
    config = ScorerConfig(aesthetics=str(file), aesthetics_clip=str(clip_folder))
    found = {one.name: one for one in scorers.scorers(config, None, [one.prompt for one in DRAWN])}
    with torch.no_grad():
        expected = layers(load_clip(str(clip_folder), "--clip").images([one.image for one in DRAWN]))[:, 0]
    assert found["aesthetics"].score(DRAWN) == pytest.approx(expected.numpy(), abs=1e-6)
    wrong = tmp_path / "wrong.safetensors"
    save_file({"layers.0.weight": torch.zeros(1, 7), "layers.0.bias": torch.zeros(1)}, wrong)
    with pytest.raises(ScorerError, match="reads embeddings of 7"):
        scorers.scorers(ScorerConfig(aesthetics=str(wrong), aesthetics_clip=str(clip_folder)), None, [])


def test_edits_against_their_targets(clip_folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": SIDE, "patch_size": 8}
    model = Dinov2Model(Dinov2Config(**shape)).eval()
    model.save_pretrained(tmp_path)
    CLIPImageProcessorPil.from_pretrained(clip_folder).save_pretrained(tmp_path)
    prompts = [Prompt(one.prompt.text, source="s", target="t") for one in DRAWN]
    config = ScorerConfig(clip=str(clip_folder), dino=str(tmp_path))
    found = {one.name: one for one in scorers.scorers(config, None, prompts)}
    for name in ("clip_image", "dino"):
        values = found[name].score(DRAWN)
        assert values[2] == pytest.approx(1, abs=1e-5)  # its own target
        assert (values[:2] < 0.9999).all()
    assert not found["l1"].higher_is_better
    distances = found["l1"].score(DRAWN)
    first = np.asarray(DRAWN[0].image, float), np.asarray(picture(5), float)
    assert distances[0] == pytest.approx(np.abs(first[0] - first[1]).mean() / 255)
    assert distances[2] == 0
    processor = CLIPImageProcessorPil.from_pretrained(clip_folder)
    with torch.no_grad():
        ours, target = (
            model(processor(images=[image], return_tensors="pt").pixel_values).last_hidden_state[0, 0]
            for image in (DRAWN[0].image, picture(5))
        )
    assert found["dino"].score(DRAWN)[0] == pytest.approx(float(torch.cosine_similarity(ours, target, dim=0)), abs=1e-5)


def test_colourfulness_by_hand() -> None:
    assert scorers.colourfulness(Image.new("RGB", (4, 4), (90, 90, 90))) == 0
    # Red everywhere: rg = 200, yb = 100, no spread.
    assert scorers.colourfulness(Image.new("RGB", (4, 4), (200, 0, 0))) == pytest.approx(0.3 * np.hypot(200, 100))
    halves = Image.new("RGB", (2, 1), (200, 0, 0))
    halves.putpixel((1, 0), (0, 200, 0))  # rg = ±200, yb = 100
    assert scorers.colourfulness(halves) == pytest.approx(200 + 0.3 * 100)


def test_image_reward_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ScorerError, match="needs the package image-reward"):
        scorers.image_reward("ImageReward.pt")
    package: Any = ModuleType("ImageReward")
    package.load = lambda name, device: type("Model", (), {"score": lambda self, prompt, image: len(prompt)})()
    monkeypatch.setitem(sys.modules, "ImageReward", package)
    monkeypatch.setattr(scorers.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ScorerError, match="no such file"):
        scorers.image_reward(str(tmp_path / "ImageReward.pt"))
    (tmp_path / "ImageReward.pt").touch()
    assert scorers.image_reward(str(tmp_path / "ImageReward.pt")).score(DRAWN[:2]).tolist() == [12, 28]


def test_weights_that_cannot_be_used(clip_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "pickle.pt").write_bytes(b"PK\x03\x04 what torch writes begins so")
    save_file({"visual.odd": torch.zeros(1)}, tmp_path / "odd.safetensors")
    save_file({"logit_scale": torch.zeros(())}, tmp_path / "few.safetensors")
    (tmp_path / "empty").mkdir()
    folder = str(clip_folder)
    cases = {
        "no such folder": ScorerConfig(clip=str(tmp_path / "nowhere")),
        "--pickscore: cannot be loaded": ScorerConfig(pickscore=str(tmp_path / "empty")),
        "--hpsv2 needs --hpsv2-clip": ScorerConfig(hpsv2="x.pt"),
        "x.pt: there is no such file": ScorerConfig(hpsv2="x.pt", hpsv2_clip=folder),
        "pickle.pt: not a safetensors": ScorerConfig(hpsv2=str(tmp_path / "pickle.pt"), hpsv2_clip=folder),
        "visual.odd is no weight": ScorerConfig(hpsv2=str(tmp_path / "odd.safetensors"), hpsv2_clip=folder),
        "does not fit": ScorerConfig(hpsv2=str(tmp_path / "few.safetensors"), hpsv2_clip=folder),
    }
    for message, config in cases.items():
        with pytest.raises(ScorerError, match=message):
            scorers.scorers(config, None, [])


def test_a_score_that_is_not_finite_is_an_error() -> None:
    broken = Scorer("odd", lambda drawn: np.array([0.0, np.nan, 1.0]), "")
    with pytest.raises(ScorerError, match="odd gave nan for an image of 'a large blue square on black'"):
        scorers.checked(broken, DRAWN)
