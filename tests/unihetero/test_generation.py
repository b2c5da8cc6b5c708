"""Free running: the cache changes nothing, feedback is what the head predicts, images come out."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from palate.unihetero.generation import Stream, draw_embeddings, draw_images, image_prefix, predicted_embedding, say
from palate.unihetero.heads import to_scale
from toy_unihetero import FEATURES, PLACES, model, phrasing


def prompt():
    return torch.tensor([phrasing().ids("Caption: a red circle left")])


@pytest.mark.parametrize("arm", ["embedding", "encoder"])
def test_with_the_cache_as_without(arm):
    network = model(arm).eval()
    inputs = image_prefix(network, prompt())
    drawn = draw_embeddings(Stream.begin(network, inputs), PLACES)
    for place in range(PLACES):
        whole = torch.cat([inputs, drawn[:, :place]], dim=1)
        state = network.decode(whole).last_hidden_state[:, -1]
        torch.testing.assert_close(drawn[:, place], predicted_embedding(network, state), rtol=1e-4, atol=1e-6)


def test_embeddings_have_the_size_that_the_model_reads():
    network = model("embedding").eval()
    drawn = draw_embeddings(Stream.begin(network, image_prefix(network, prompt())), PLACES)
    sizes = drawn.square().mean(-1).sqrt()
    torch.testing.assert_close(sizes, torch.full_like(sizes, float(network.projector.scale)))
    features = torch.randn(1, PLACES, FEATURES)
    true = network.projector(features)
    torch.testing.assert_close(true.square().mean(-1).sqrt(), sizes)


def test_encoder_predictions_come_in_through_the_projector():
    network = model("encoder").eval()
    state = torch.randn(2, network.config.text_config.hidden_size)
    expected = network.projector(network.semantic_head(state))
    assert torch.equal(predicted_embedding(network, state), expected)


def test_a_diffusion_head_gives_other_draws_for_other_seeds():
    network = model("embedding", "diffusion").eval()
    for parameter in network.semantic_head.parameters():
        torch.nn.init.normal_(parameter, std=0.1)

    def drawn(*seeds):
        rows = image_prefix(network, prompt()[:1].expand(len(seeds), -1))
        return draw_embeddings(Stream.begin(network, rows), 2, [torch.Generator().manual_seed(seed) for seed in seeds])

    alone, together = drawn(0), drawn(1, 0)
    torch.testing.assert_close(together[1], alone[0], rtol=1e-4, atol=1e-5)  # whatever the others are
    assert not torch.allclose(together[0], together[1])


@pytest.mark.parametrize("arm", ["understanding", "pixel", "isolated", "unshifted"])
def test_arms_that_cannot_draw_say_so(arm):
    network = model(arm).eval()
    with pytest.raises(ValueError, match="this model cannot draw"):
        draw_embeddings(Stream.begin(network, image_prefix(network, prompt())), 2)


def tiny_vae():
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=6,
        norm_num_groups=4,
        layers_per_block=1,
        mid_block_add_attention=False,
    ).eval()


def test_images_of_a_text_by_seed():
    network = model("decoder").eval()
    torch.nn.init.normal_(network.pixel_head.head.outward.weight, std=0.1)
    ids = phrasing().ids("Caption: a red circle left")
    first = draw_images(network, tiny_vae(), ids, [3, 4], steps=3)
    again = draw_images(network, tiny_vae(), ids, [4], steps=3)
    assert first.shape == (2, 3, 4, 4)  # a grid of 2 x 2 latents, stride 2
    assert bool(((first >= 0) & (first <= 1)).all())
    torch.testing.assert_close(first[1], again[0], rtol=1e-4, atol=1e-5)
    assert not torch.equal(first[0], first[1])
    with pytest.raises(ValueError, match="no pixel decoder"):
        draw_images(model("embedding").eval(), tiny_vae(), ids, [0])


def test_text_after_an_image_is_what_greedy_decoding_without_a_cache_says():
    network, said = model("embedding", seed=3).eval(), phrasing()
    features = torch.randn(1, PLACES, FEATURES)
    ids = [*said.image(), *said.asked("what is it")]
    (piece,) = say(network, ids, features, end=said.end, most=6)
    never = [network.config.image_token_id, network.config.image_start_id, network.config.image_end_id]
    expected = []
    for _ in range(6):
        logits = network(input_ids=torch.tensor([[*ids, *expected]]), image_features=features).logits[0, -1]
        logits[never] = -torch.inf
        if int(logits.argmax()) == said.end:
            break
        expected.append(int(logits.argmax()))
    assert list(piece.ids) == expected


def test_text_and_images_in_turn():
    network, said = model("embedding").eval(), phrasing()
    start = network.config.image_start_id
    with torch.no_grad():  # a model that always wants to draw
        network.get_output_embeddings().weight[:] = 0
    hook = network.get_output_embeddings().register_forward_hook(
        lambda module, inputs, output: output + 5 * F.one_hot(torch.tensor(start), output.shape[-1])
    )
    pieces = say(network, said.ids("a red circle"), None, end=said.end, most=4, images=2)
    hook.remove()
    assert [piece.embeddings_Pd is not None for piece in pieces[:2]] == [True, True]
    assert pieces[0].embeddings_Pd.shape == (PLACES, network.config.text_config.hidden_size)
    assert sum(piece.embeddings_Pd is not None for piece in pieces) == 2


def test_scale_keeps_directions():
    values = torch.randn(4, 7)
    scaled = to_scale(values, 0.3)
    torch.testing.assert_close(F.cosine_similarity(values, scaled), torch.ones(4))
    torch.testing.assert_close(scaled.square().mean(-1).sqrt(), torch.full((4,), 0.3))
