"""The unified model: which parameters each arm teaches, where gradients stop, masks, formats."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoModelForCausalLM, Dinov2Config, SiglipVisionConfig

from palate.unihetero.arms import Arm
from palate.unihetero.model import UniHeteroConfig, UniHeteroModel, grid, semantic_loss
from palate.unihetero.objectives import Weights, total
from palate.unihetero.samples import collate
from palate.unihetero.training import parameters
from toy_unihetero import FEATURES, PLACES, WIDTH, config, language, model, phrasing, samples, tokenizer, vision

ALL = Weights(1.0, 1.0, 1.0)


def outputs(arm, rows=None, **values):
    network = model(arm, **values).train()
    batch = collate(rows or [[sample] for sample in samples()])
    return network, network(**batch.arguments())


def taught(network, loss):
    """Top-level parts that a loss gives any gradient."""
    network.zero_grad(set_to_none=True)
    loss.backward(retain_graph=True)
    return {
        name.partition(".")[0]
        for name, parameter in network.named_parameters()
        if parameter.grad is not None and bool(parameter.grad.any())
    }


# Gradients


@pytest.mark.parametrize(
    ("arm", "semantic", "pixel"),
    [
        ("understanding", None, None),
        ("encoder", {"language", "projector", "semantic_head"}, None),
        ("embedding", {"language", "projector", "semantic_head"}, None),
        ("pixel", None, {"language", "projector", "pixel_head"}),
        ("decoder", {"language", "projector", "semantic_head"}, {"pixel_head"}),
        ("isolated", {"language", "projector", "semantic_head", "branch"}, None),
        ("capacity", {"language", "projector", "semantic_head"}, None),
        ("shuffled", {"language", "projector", "semantic_head"}, None),
        ("unshifted", {"language", "projector", "semantic_head"}, None),
    ],
)
def test_each_loss_teaches_its_parts(arm, semantic, pixel):
    network, output = outputs(arm)
    for head in (network.pixel_head,):  # its last layers begin at zero, and pass nothing back
        for parameter in head.parameters() if head is not None else ():
            torch.nn.init.normal_(parameter, std=0.1)
    output = network(**collate([[sample] for sample in samples()]).arguments())
    assert taught(network, output.text_loss) == {"language", "projector"}
    for value, expected in ((output.semantic_loss, semantic), (output.pixel_loss, pixel)):
        assert (value is None) == (expected is None)
        if value is not None:
            assert taught(network, value) == expected
    assert not any(p.requires_grad for p in network.vision.parameters())


def test_the_isolated_branch_leaves_the_upper_layers_alone():
    network, output = outputs("isolated")
    network.zero_grad(set_to_none=True)
    output.semantic_loss.backward()
    layers = [
        any(bool(p.grad.any()) for p in layer.parameters() if p.grad is not None) for layer in network.decoder.layers
    ]
    assert layers == [True, False, False]


def test_a_target_gives_the_projector_no_gradient_unless_it_is_open():
    # Were the target's gradient there, the projector would get more than through the language model's input.
    found = {}
    for target in ("current", "frozen", "ema", "open"):
        network, output = outputs(Arm(semantic="embedding", target=target))
        network.zero_grad(set_to_none=True)
        output.semantic_loss.backward()
        found[target] = network.projector.down.weight.grad
    assert torch.equal(found["current"], found["frozen"])
    assert torch.equal(found["current"], found["ema"])
    assert not torch.allclose(found["current"], found["open"], atol=1e-6)


def test_a_head_at_weight_0_costs_but_teaches_nothing():
    plain, output = outputs("understanding")
    loss, _ = total(output, ALL, {"text": 1.0, "visual": 1.0})
    control, headed = outputs("capacity")
    silent, _ = total(headed, Weights(1.0, 0.0, 0.0), {"text": 1.0, "visual": 1.0})
    loss.backward()
    silent.backward()
    for (name, left), right in zip(plain.named_parameters(), control.parameters(), strict=False):
        if name.startswith("language") and left.grad is not None:
            assert torch.equal(left.grad, right.grad), name


def test_arms_begin_with_equal_language_models_and_projectors():
    plain = model("understanding")
    for arm in ("embedding", "decoder", "pixel", "isolated"):
        network = model(arm)
        for part in ("language", "projector"):
            states = [getattr(one, part).state_dict() for one in (plain, network)]
            assert all(torch.equal(states[0][key], states[1][key]) for key in states[0]), arm


# Losses


def test_losses_equal_their_formulas():
    network, output = outputs("embedding")
    network.eval()
    rows = samples()
    batch = collate([[sample] for sample in rows])
    output = network(**batch.arguments())
    logits = network(**{**batch.arguments(), "labels": None}).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(output.text_loss, expected)
    # By hand: the state before each visual token, the target after the projector.
    states = output.states
    total_loss = 0.0
    for row, sample in enumerate(rows):
        first = sample.prefix.index(network.config.image_token_id)
        told = network.semantic_head(states[row, first - 1 : first - 1 + PLACES])
        target = network.target_projector(sample.images[0])
        total_loss += (1 - F.cosine_similarity(told, target, dim=-1)).sum().item()
    assert float(output.semantic_loss) == pytest.approx(total_loss, rel=1e-5)
    assert (output.text_count, output.visual_count) == (sum(s.supervised for s in rows), 3 * PLACES)


@pytest.mark.parametrize("loss", ["cosine", "mse", "diffusion"])
def test_every_semantic_loss_falls_when_it_is_trained(loss):
    network = model("embedding", loss).train()
    batch = collate([[sample] for sample in samples(6)])
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    found = []
    for _ in range(60):
        output = network(**batch.arguments())
        (output.semantic_loss / output.visual_count).backward()
        found.append(float(output.semantic_loss) / output.visual_count)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    assert found[-1] < (0.9 if loss == "diffusion" else 0.5) * found[0]


def test_mse_is_over_each_targets_own_square():
    predicted, targets = torch.randn(5, 8), torch.randn(5, 8)
    whole = semantic_loss(predicted, targets, "mse")
    assert torch.equal(whole[:2], semantic_loss(predicted[:2], targets[:2], "mse"))  # whatever else is in the batch
    torch.testing.assert_close(whole, ((predicted - targets) ** 2).sum(1) / (targets**2).sum(1))


def test_mse_of_vectors_of_one_size_is_twice_1_minus_cosine():
    left, right = (F.normalize(torch.randn(5, 8, dtype=torch.float64), dim=-1) for _ in range(2))
    torch.testing.assert_close(
        semantic_loss(left, right, "mse").mean(), 2 * semantic_loss(left, right, "cosine").mean()
    )


def test_other_images_targets_are_predicted_where_a_sample_brings_them():
    network, rows = model("shuffled"), samples()
    others = torch.randn(3, 1, PLACES, FEATURES)
    given = collate([[replace(sample, targets=other)] for sample, other in zip(rows, others, strict=True)])
    output = network(**given.arguments())
    torch.testing.assert_close(output.targets.view(3, PLACES, -1), network.target_of(others[:, 0]))
    plain = network(**collate([[sample] for sample in rows]).arguments())
    assert torch.equal(output.text_loss, plain.text_loss)
    assert torch.equal(output.predicted, plain.predicted)


def test_the_target_follows_the_projector():
    network = model("embedding")
    before = network.target_projector.down.weight.clone()
    with torch.no_grad():
        network.projector.down.weight.add_(1.0)
    network.follow(0.9)
    torch.testing.assert_close(network.target_projector.down.weight, before + 0.1)
    frozen = model(Arm(semantic="embedding", target="frozen"))
    with torch.no_grad():
        frozen.projector.down.weight.add_(1.0)
    frozen.follow(0.9)
    torch.testing.assert_close(frozen.target_projector.down.weight, frozen.projector.down.weight - 1.0)


# Masks


def test_segments_and_packs_do_not_see_one_another():
    network = model("embedding").eval()
    alone = [network(**collate([[sample]]).arguments()) for sample in samples()]
    packed = network(**collate([samples()]).arguments())
    assert float(packed.text_loss) == pytest.approx(sum(float(one.text_loss) for one in alone), rel=1e-5)
    assert float(packed.semantic_loss) == pytest.approx(sum(float(one.semantic_loss) for one in alone), rel=1e-5)
    # A question's loss does not change with the others that stand beside it.
    sample = samples(1)[0]
    single = [
        float(network(**collate([[type(sample)(**{**vars(sample), "segments": (segment,)})]]).arguments()).text_loss)
        for segment in sample.segments
    ]
    assert float(alone[0].text_loss) == pytest.approx(sum(single), rel=1e-5)


def test_padding_changes_nothing_and_is_a_number():
    network = model("embedding").eval()
    short, long = samples(3)[2], samples(1)[0]
    both = network(**collate([[short], [long]]).arguments())
    assert both.states.isfinite().all()
    alone = network(**collate([[short]]).arguments())
    torch.testing.assert_close(both.states[0, : short.length], alone.states[0], rtol=1e-4, atol=1e-5)


def test_equal_to_the_plain_language_model_where_there_is_no_image():
    network = model().eval()
    ids = torch.tensor([phrasing().ids("a red circle left what is it")])
    reference = language()
    reference.eval()
    torch.testing.assert_close(network(input_ids=ids).logits, reference(input_ids=ids).logits)


def test_eager_attention_sees_what_sdpa_sees():
    found = []
    for attention in ("sdpa", "eager"):
        network = model("embedding").eval()
        network.language.set_attn_implementation(attention)
        found.append(network(**collate([samples()]).arguments()))
    torch.testing.assert_close(found[0].text_loss, found[1].text_loss)
    torch.testing.assert_close(found[0].states, found[1].states, rtol=1e-4, atol=1e-5)


def test_images_of_another_size_than_the_encoder_was_trained_on():
    settings = config(image_size=32)
    assert settings.feature_width == FEATURES * 4 or settings.merge == "mean"
    settings.image_tokens = 16
    network = UniHeteroModel.from_parts(language(), vision(), settings).eval()
    pixels = torch.randn(2, 3, 32, 32)
    expected = network.vision(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state[:, 1:]
    torch.testing.assert_close(network.encode(pixels), expected)
    with pytest.raises(ValueError, match="expected 32 a side"):
        network.encode(torch.randn(1, 3, 16, 16))


def test_places_and_features_must_agree():
    network = model()
    batch = collate([[samples(1)[0]]])
    with pytest.raises(ValueError, match="places for 4 visual tokens, the images give 8"):
        network(**{**batch.arguments(), "image_features": torch.zeros(2, PLACES, FEATURES)})


def test_pixels_and_features_give_the_same():
    network = model("embedding").eval()
    pixels = samples(encoded=False)
    batch = collate([[sample] for sample in pixels])
    features = network.encode(batch.pixel_values)
    assert features.shape == (3, PLACES, FEATURES)
    left = network(**batch.arguments())
    right = network(**{**batch.arguments(), "pixel_values": None, "image_features": features})
    torch.testing.assert_close(left.semantic_loss, right.semantic_loss)


# Formats


@pytest.mark.parametrize("arm", ["understanding", "embedding", "decoder", "isolated", "pixel"])
def test_saved_and_loaded_by_transformers(arm, tmp_path):
    network = model(arm).eval()
    network.save_pretrained(tmp_path)
    loaded, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(loaded, UniHeteroModel)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    batch = collate([[sample] for sample in samples()]).arguments()
    assert torch.equal(loaded.eval()(**batch).text_loss, network(**batch).text_loss)
    for name in ("semantic", "target", "shift", "branch_from", "pixels", "image_token_id", "embed_scale"):
        assert getattr(loaded.config, name) == getattr(network.config, name)
    assert not any(p.requires_grad for p in loaded.vision.parameters())


@pytest.mark.parametrize("kind", ["dinov2", "siglip", "wider"])
def test_grids_of_published_encoders(kind):
    shared = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
    if kind == "siglip":
        encoder = AutoModel.from_config(SiglipVisionConfig(**shared, intermediate_size=16))
    else:
        encoder = AutoModel.from_config(Dinov2Config(**shared))
    tokens = 4 if kind == "wider" else 16
    settings = UniHeteroConfig(vision_config=encoder.config, image_tokens=tokens)
    hidden = encoder.eval()(pixel_values=torch.randn(2, 3, 56, 56)).last_hidden_state
    found = grid(hidden, settings)
    assert found.shape == (2, tokens, 16)
    patches = hidden[:, -16:]
    expected = patches if tokens == 16 else patches.view(2, 2, 2, 2, 2, 16).mean((2, 4)).view(2, 4, 16)
    torch.testing.assert_close(found, expected)
    if kind == "wider":  # side by side: the mean over the four is the average
        settings = UniHeteroConfig(vision_config=encoder.config, image_tokens=4, merge="concatenate")
        beside = grid(hidden, settings)
        assert beside.shape == (2, 4, settings.feature_width) == (2, 4, 64)
        torch.testing.assert_close(beside.unflatten(2, (16, 4)).mean(-1), found)
    with pytest.raises(ValueError, match="cannot be merged to 9"):
        grid(hidden, UniHeteroConfig(vision_config=encoder.config, image_tokens=9))


def test_any_decoder_only_language_model_fits():
    from transformers import GPT2Config, Qwen3Config

    for text in (
        Qwen3Config(
            vocab_size=len(tokenizer()),
            hidden_size=WIDTH,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
        ),
        GPT2Config(vocab_size=len(tokenizer()), n_embd=WIDTH, n_layer=3, n_head=2),
    ):
        settings = config(semantic="embedding")
        settings.text_config = text
        torch.manual_seed(0)
        network = UniHeteroModel.from_parts(AutoModelForCausalLM.from_config(text), vision(), settings)
        output = network(**collate([[sample] for sample in samples()]).arguments())
        assert taught(network, output.text_loss + output.semantic_loss) >= {"language", "projector", "semantic_head"}
        assert len(network.layers) == 3


def test_a_model_with_learned_positions_has_no_branch():
    from transformers import GPT2Config

    text = GPT2Config(vocab_size=len(tokenizer()), n_embd=WIDTH, n_layer=3, n_head=2)
    settings = config(semantic="embedding", branch_from=1)
    settings.text_config = text
    with pytest.raises(ValueError, match="a gpt2 cannot be branched"):
        UniHeteroModel(settings)


def test_stages_train_their_parts():
    network = model("decoder")
    names = {stage: dict(parameters(network, stage)) for stage in ("projector", "joint", "pixels")}
    assert {name for name, _ in names["projector"]["language"]} == {
        name for name, _ in network.named_parameters() if name.startswith("projector.")
    }
    assert set(names["joint"]) == {"language", "heads", "pixels"}
    assert set(names["pixels"]) == {"pixels"}
    with pytest.raises(ValueError, match="nothing to train"):
        parameters(model("embedding"), "pixels")


def test_the_pixel_stage_leaves_the_language_model_alone():
    network = model("decoder")
    for parameter in network.pixel_head.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    given = collate([[sample] for sample in samples()]).arguments()
    whole = network(**given)
    network.decoder.forward = None  # would fail if it were called
    alone = network(**given, losses="pixels")
    assert torch.equal(alone.pixel_loss, whole.pixel_loss)
    assert (alone.text_loss, alone.semantic_loss, alone.visual_count) == (None, None, whole.visual_count)
    texts = network(input_ids=torch.tensor([[1, 2]]), labels=torch.tensor([[1, 2]]), losses="pixels")
    texts.pixel_loss.backward()
    assert (texts.pixel_loss.item(), texts.visual_count) == (0.0, 0)
    assert all(not parameter.grad.any() for parameter in network.pixel_head.parameters())


def test_the_projector_stage_leaves_the_heads_alone():
    network = model("embedding")
    given = collate([[sample] for sample in samples()]).arguments()
    whole = network(**given)
    network.semantic_head.forward = None
    alone = network(**given, losses="text")
    assert torch.equal(alone.text_loss, whole.text_loss)
    assert alone.semantic_loss is None
