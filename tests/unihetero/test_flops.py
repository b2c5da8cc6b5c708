"""The analytic count of FLOPs against torch's own counter, on tiny models of every arm."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, Dinov2Config, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from palate.unihetero import flops as counts
from palate.unihetero import heads, model
from palate.unihetero.arms import ARMS, configured
from palate.unihetero.flops import Cost, ModelShape, TransformerShape
from palate.unihetero.model import UniHeteroConfig, UniHeteroModel
from palate.unihetero.training import LOSSES, parameters

TEXT = 10


def counted(compute: Callable[[], Any]) -> float:
    with FlopCounterMode(display=False) as counter:
        compute()
    return float(counter.get_total_flops())


def llama_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="eager",  # torch's counter adds what fused attention computes again in its backward pass
    )


def test_a_llama_forward_and_backward() -> None:
    language = LlamaForCausalLM(llama_config())
    tokens = torch.arange(12)[None]
    shape = ModelShape(TransformerShape(4, 32, 48, 4, 2, 8), vocabulary=40, vision=None, image_tokens=0)
    expected = counts.flops_per_sample(shape, 12, images=0)
    assert counted(lambda: language(input_ids=tokens)) == expected.forward
    both = counted(lambda: language(input_ids=tokens).logits.sum().backward())
    assert both == expected.total
    # 6 N a token, and attention: 12 L T^2 d.
    weights = sum(p.numel() for n, p in language.named_parameters() if "proj" in n or "lm_head" in n)
    assert expected.total == 6 * weights * 12 + 12 * 4 * 12**2 * 32
    assert shape.trained == weights  # tied: the embedding is the text head


def test_weights_of_known_models() -> None:
    smollm = ModelShape(TransformerShape(30, 576, 1536, 9, 3, 64), 49152, None, 0)
    assert smollm.trained == pytest.approx(134.5e6, rel=0.001)
    llama = ModelShape(TransformerShape(16, 2048, 8192, 32, 8, 64), 128256, None, 0)
    assert llama.trained == pytest.approx(1.2358e9, rel=0.001)
    dino = counts.VisionShape(TransformerShape(12, 768, 3072, 12, 12, 64, gated=False), 224, 14)
    assert dino.parameters == pytest.approx(86e6, rel=0.02)
    assert (dino.patches, dino.tokens) == (256, 257)


def tiny(arm: str, loss: model.SemanticLoss = "cosine") -> UniHeteroConfig:
    vision = Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=4, image_size=16, patch_size=4,
        attn_implementation="eager",
    )  # fmt: skip
    base = UniHeteroConfig(
        text_config=llama_config(), vision_config=vision, image_tokens=16, image_token_id=39, image_start_id=38,
        image_end_id=37, latent_width=6, head_width=20, head_blocks=2,
    )  # fmt: skip
    return configured(base, ARMS[arm], loss, branch_from=3)  # type: ignore[index]


@pytest.mark.parametrize(
    ("arm", "loss"),
    [
        *(
            (name, "cosine")
            for name in ("understanding", "encoder", "embedding", "pixel", "decoder", "isolated", "open")
        ),
        ("embedding", "diffusion"),
    ],
)
def test_arms_forward_and_backward(arm: str, loss: model.SemanticLoss) -> None:
    config = tiny(arm, loss)
    network = UniHeteroModel(config).train()
    for part in (network.language, network.vision, network.branch):
        if part is not None:
            part.set_attn_implementation("eager")
    images, latents = torch.randn(1, 3, 16, 16), torch.randn(1, 16, 6)
    ids = torch.tensor([[*range(4), 38, *[39] * 16, 37, *range(TEXT - 4)]])
    labels = torch.where(ids < 20, ids, -100)
    shape = counts.shape_of(config)
    expected = counts.flops_per_sample(shape, TEXT, supervised_tokens=TEXT - 1)  # nothing predicts the first token
    # Attention by plain matmuls, as torch's counter does not know the fused ones of every device.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        out = network(input_ids=ids, pixel_values=images, labels=labels, latents=latents, seeds=[1])
        assert counter.get_total_flops() == expected.forward
        losses = [value for value in (out.text_loss, out.semantic_loss, out.pixel_loss) if value is not None]
        sum(losses[1:], losses[0]).backward()
    assert counter.get_total_flops() == expected.total
    assert sum(part.total for part in expected.by_part.values()) == expected.total
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad and p.dim() > 1)
    assert shape.trained == pytest.approx(trained, rel=0.01)


@pytest.mark.parametrize(
    ("arm", "stage"),
    [("understanding", "projector"), ("isolated", "projector"), ("decoder", "pixels"), ("decoder", "joint")],
)
def test_stages_cost_what_they_need(arm: str, stage: Any) -> None:
    config = tiny(arm)
    network = UniHeteroModel(config).train()
    for part in (network.language, network.vision, network.branch):
        if part is not None:
            part.set_attn_implementation("eager")
    trained = {id(p) for _, members in parameters(network, stage) for _, p in members}
    for parameter in network.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    ids = torch.tensor([[*range(4), 38, *[39] * 16, 37, *range(TEXT - 4)]])
    labels = torch.where(ids < 20, ids, -100)
    expected = counts.flops_per_sample(counts.shape_of(config), TEXT, supervised_tokens=TEXT - 1, stage=stage)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        out = network(
            input_ids=ids,
            pixel_values=torch.randn(1, 3, 16, 16),
            labels=labels,
            latents=torch.randn(1, 16, 6),
            seeds=[1],
            losses=LOSSES[stage],
        )
        assert counter.get_total_flops() == expected.forward
        losses = [value for value in (out.text_loss, out.semantic_loss, out.pixel_loss) if value is not None]
        sum(losses[1:], losses[0]).backward()
    assert counter.get_total_flops() == pytest.approx(expected.total, rel=0.02)


@pytest.mark.parametrize("inner", [None, 40])
def test_a_gpt2_has_no_gate(inner: int | None) -> None:
    text = GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_inner=inner, n_positions=16)
    config = tiny("understanding")
    config.text_config = text
    shape = counts.shape_of(config).text
    language = GPT2LMHeadModel(text)
    weights = sum(p.numel() for n, p in language.named_parameters() if ".h." in n and p.dim() == 2)
    assert shape.layers * shape.weights_per_layer == weights


def test_patches_side_by_side_make_a_wider_projector() -> None:
    config = tiny("encoder")
    config.image_tokens, config.merge = 4, "concatenate"
    shape = counts.shape_of(config)
    assert shape.feature_width == config.feature_width == 96
    projector = UniHeteroModel(config).projector
    found = counts.flops_per_sample(shape, TEXT).by_part["projector"]
    assert counted(lambda: projector(torch.randn(4, 96))) == found.forward
    assert shape.semantic_width == 96


def test_a_diffusion_head_counts_its_draws() -> None:
    head = heads.DiffusionHead(6, 10, width=20, blocks=2)
    condition = torch.randn(7, 10, requires_grad=True)
    noise = heads.draw_noise([0], 7, 6, counts.DRAWS, 0.1, torch.device("cpu"))
    expected = counts.diffusion_loss(7, 6, 10, 20, 2, counts.DRAWS)
    assert counted(lambda: head.loss(torch.randn(7, 6), condition, noise)) == expected.forward
    both = counted(lambda: head.loss(torch.randn(7, 6), condition, noise).sum().backward())
    assert both == expected.total
    assert counts.DRAWS == model.DRAWS
    weights = sum(p.numel() for p in head.parameters() if p.dim() == 2)
    assert counts.diffusion_weights(6, 10, 20, 2) == weights


def test_frozen_parts_have_no_backward_pass() -> None:
    found = counts.flops_per_sample(counts.shape_of(tiny("embedding")), TEXT)
    assert found.by_part["vision encoder"].backward == 0
    assert found.by_part["target"].backward == 0
    assert found.by_part["target"].forward == found.by_part["projector"].forward
    before = counts.flops_per_sample(counts.shape_of(tiny("embedding")), TEXT, encoded=True)
    assert before.total == found.total - found.by_part["vision encoder"].total


def test_checkpointing_computes_the_layers_again_but_is_no_model_work() -> None:
    shape = counts.shape_of(tiny("isolated"))
    plain = counts.flops_per_sample(shape, TEXT)
    again = counts.flops_per_sample(shape, TEXT, checkpoint_activations=True)
    assert again.total == plain.total == plain.hardware
    layers = plain.by_part["language layers"].forward + plain.by_part["branch"].forward
    assert again.hardware == plain.total + layers
    assert plain.by_part["branch"].total == pytest.approx(plain.by_part["language layers"].total / 4)


def test_a_matmul() -> None:
    assert counts.linear(3, 5, 7) == Cost(210, 420)
    assert counts.linear(3, 5, 7, to_input=False) == Cost(210, 210)
    assert counts.linear(3, 5, 7, trained=False) == Cost(210, 0)
    assert counts.utilization(4e14, 2, 5e14) == pytest.approx(0.4)


def test_shapes_of_other_encoders() -> None:
    config = tiny("encoder")
    config.vision_config = AutoConfig.for_model("siglip_vision_model", image_size=32, patch_size=8)
    config.image_size = 32
    assert counts.shape_of(config).vision.patches == 16  # type: ignore[union-attr]
