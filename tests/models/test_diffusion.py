"""Loading diffusers pipelines of every family, and encoding with them; what is wrong with a folder, said in words."""

import json
import shutil

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from safetensors.torch import load_file, save_file

from palate.models import diffusion
from tiny_diffusion import CAPTIONS, KINDS, SIDE, save_tiny

EXPECTED = {
    "sd": ("sd", "epsilon", 1),
    "sd-v": ("sd", "v_prediction", 1),
    "sdxl": ("sdxl", "epsilon", 2),
    "sd3": ("sd3", "flow", 3),
    "flux": ("flux", "flow", 2),
    "ip2p": ("ip2p", "epsilon", 1),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tmp_path_factory.mktemp("pipelines")


@pytest.fixture
def copied(folders, tmp_path):
    """A folder of the plain SD pipeline, to be damaged."""
    return shutil.copytree(save_tiny("sd", folders), tmp_path / "model")


@torch.no_grad()
def vanilla_text(kind, pipeline):
    """(text, pooled) by diffusers' public method, called as its own training scripts call it."""
    if kind in ("sd", "sd-v"):
        return pipeline.encode_prompt(CAPTIONS, "cpu", 1, False)[0], None
    if kind == "sdxl":
        text, _, pooled, _ = pipeline.encode_prompt(CAPTIONS, device="cpu", do_classifier_free_guidance=False)
    elif kind == "sd3":
        text, _, pooled, _ = pipeline.encode_prompt(CAPTIONS, CAPTIONS, CAPTIONS, do_classifier_free_guidance=False)
    elif kind == "flux":
        text, pooled, _ = pipeline.encode_prompt(CAPTIONS, CAPTIONS)
    else:  # InstructPix2Pix has no public method: the encoder's last hidden states
        padded = pipeline.tokenizer(CAPTIONS, padding="max_length", max_length=16, return_tensors="pt").input_ids
        return pipeline.text_encoder(padded).last_hidden_state, None
    return text, pooled


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_loads_and_encodes_as_diffusers_does(kind, folders):
    folder = save_tiny(kind, folders)
    loaded = diffusion.load_diffusion(str(folder))
    vanilla = DiffusionPipeline.from_pretrained(folder)
    assert (loaded.family, loaded.prediction, len(loaded.text_encoders)) == EXPECTED[kind]
    assert len(loaded.tokenizers) == len(loaded.text_encoders)
    assert loaded.pipeline_class == type(vanilla).__name__
    assert type(loaded.scheduler) is type(vanilla.scheduler)
    assert not any(part.training for part in (loaded.denoiser, loaded.vae, *loaded.text_encoders))
    expected = getattr(vanilla, loaded.denoiser_name).state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in loaded.denoiser.state_dict().items())

    text, pooled = vanilla_text(kind, vanilla)
    found = diffusion.encode_text(loaded, CAPTIONS)
    assert torch.equal(found["prompt_embeds"], text)
    assert not torch.equal(text[0], text[1])
    assert ("pooled_prompt_embeds" in found) == (pooled is not None)
    if pooled is not None:
        assert torch.equal(found["pooled_prompt_embeds"], pooled)

    images = torch.rand(2, 3, SIDE, SIDE) * 2 - 1
    mean, deviation = diffusion.encode_images(loaded, images)
    with torch.no_grad():
        posterior = vanilla.vae.encode(images).latent_dist
    assert mean.shape == (2, 4, SIDE // 2, SIDE // 2)
    assert torch.equal(mean, posterior.mean)
    assert torch.equal(deviation, posterior.std)


def test_what_is_done_to_the_denoiser_its_sampling_sees(folders):
    loaded = diffusion.load_diffusion(str(save_tiny("sd", folders)))

    def sample():
        generator = torch.Generator().manual_seed(0)
        return loaded.pipeline("a", num_inference_steps=2, generator=generator, output_type="pt").images

    before = sample()
    with torch.no_grad():
        loaded.denoiser.conv_out.bias.add_(0.5)
    assert not torch.equal(sample(), before)


def test_half_precision_is_kept_but_an_autoencoder_that_overflows_encodes_in_float32(folders):
    loaded = diffusion.load_diffusion(str(save_tiny("sdxl", folders)), dtype=torch.float16)
    assert {next(part.parameters()).dtype for part in (loaded.denoiser, loaded.vae)} == {torch.float16}
    images = torch.rand(1, 3, SIDE, SIDE) * 2 - 1
    mean, deviation = diffusion.encode_images(loaded, images)
    assert mean.dtype == deviation.dtype == torch.float32
    assert loaded.vae.dtype == torch.float16
    # The reference is the same rounded weights in float32; were the encoder itself in float16, means would be, too.
    assert torch.equal(mean, loaded.vae.float().encode(images).latent_dist.mean)
    assert not torch.equal(mean, mean.half().float())


def test_a_safety_checker_is_left_out(copied):
    """Stable Diffusion 1.5's index as published: the checker is named, and need not be there."""
    index = json.loads((copied / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    index.pop("requires_safety_checker")
    (copied / "model_index.json").write_text(json.dumps(index))
    assert diffusion.load_diffusion(str(copied)).pipeline.safety_checker is None


@pytest.mark.parametrize("name", diffusion.BUILT_IN)
def test_built_ins_are_the_same_every_time_and_leave_the_random_state_alone(name):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    one, other = (diffusion.load_diffusion(name) for _ in range(2))
    assert torch.equal(torch.rand(3), expected)
    for weight, again in zip(one.denoiser.parameters(), other.denoiser.parameters(), strict=True):
        assert torch.equal(weight, again)
    assert one.family == {"shapes": "sd", "shapes-edit": "ip2p"}[name]
    assert one.prediction == "v_prediction"


# What can be wrong


@pytest.mark.parametrize("name", ["/no/such/folder", "./none", "~/none/here", "a/b/c"])
def test_a_folder_that_is_not_there(name):
    with pytest.raises(ValueError, match=r"there is no such folder; a model is a hub id .* shapes-edit"):
        diffusion.load_diffusion(name)


def test_a_folder_without_a_pipeline(tmp_path):
    with pytest.raises(ValueError, match=r"model_index\.json cannot be loaded"):
        diffusion.load_diffusion(str(tmp_path))


@pytest.mark.parametrize(
    ("part", "file"),
    [
        ("unet", "diffusion_pytorch_model.safetensors"),
        ("vae", "diffusion_pytorch_model.safetensors"),
        ("text_encoder", "model.safetensors"),
        ("unet", "config.json"),
    ],
)
def test_a_file_that_is_missing_is_named(copied, part, file):
    (copied / part / file).unlink()
    with pytest.raises(ValueError, match=rf"{part} cannot be loaded: .*{file}"):
        diffusion.load_diffusion(str(copied))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_folder_of_a_part_that_is_missing_is_named(copied, part):
    shutil.rmtree(copied / part)
    with pytest.raises(ValueError, match=part):
        diffusion.load_diffusion(str(copied))


@pytest.mark.parametrize(
    ("part", "file", "weight"),
    [
        ("unet", "diffusion_pytorch_model.safetensors", "conv_in.weight"),
        ("text_encoder", "model.safetensors", "final_layer_norm.weight"),
    ],
)
def test_a_weight_that_is_missing_is_named(copied, part, file, weight):
    weights = load_file(copied / part / file)
    (full,) = [name for name in weights if name.endswith(weight)]
    del weights[full]
    save_file(weights, copied / part / file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"its {part} lacks 1 weights of a .*{weight}"):
        diffusion.load_diffusion(str(copied))


def test_a_weight_file_that_was_cut_off(copied):
    file = copied / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="unet cannot be loaded"):
        diffusion.load_diffusion(str(copied))


def test_weights_that_are_no_safetensors_are_not_read(copied):
    file = copied / "unet" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(ValueError, match=r"unet cannot be loaded: .*safetensors"):
        diffusion.load_diffusion(str(copied))


def changed_index(folder, **changes):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | changes))
    return str(folder)


def test_a_part_that_the_index_lacks(copied):
    with pytest.raises(ValueError, match=r"no text_encoder, which a StableDiffusionPipeline needs; it has scheduler, "):
        diffusion.load_diffusion(changed_index(copied, text_encoder=[None, None]))


@pytest.mark.parametrize("where", [["my_code", "UNet"], ["unet", "MyUNet"]])
def test_code_that_came_with_a_model_is_not_run(copied, where):
    with pytest.raises(ValueError, match=r"its unet is a .*, code that came with the model and is not\s+run"):
        diffusion.load_diffusion(changed_index(copied, unet=where))


def test_a_class_that_is_not_installed(copied):
    with pytest.raises(ValueError, match="its unet is a UNet9D, which the installed diffusers does not have"):
        diffusion.load_diffusion(changed_index(copied, unet=["diffusers", "UNet9D"]))


def test_other_families_are_refused_naming_those_that_are_supported(tmp_path):
    unet = UNet2DModel(8, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
                       down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is a DDPMPipeline; supported pipelines: StableDiffusionPipeline, .*Flux"):
        diffusion.load_diffusion(str(tmp_path))


def test_other_predictions_are_refused(copied):
    config = json.loads((copied / "scheduler" / "scheduler_config.json").read_text())
    (copied / "scheduler" / "scheduler_config.json").write_text(json.dumps(config | {"prediction_type": "sample"}))
    with pytest.raises(ValueError, match="prediction_type 'sample'; supported: epsilon, v_prediction"):
        diffusion.load_diffusion(str(copied))


def test_images_of_the_wrong_shape(folders):
    loaded = diffusion.load_diffusion(str(save_tiny("sd", folders)))
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\), found \(3, 32, 32\)"):
        diffusion.encode_images(loaded, torch.zeros(3, 32, 32))
    with pytest.raises(ValueError, match=r"multiples of 2, found 32x31"):
        diffusion.encode_images(loaded, torch.zeros(1, 3, 32, 31))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there():
    with pytest.raises(ValueError, match="finds no CUDA device"):
        diffusion.load_diffusion("shapes", device="cuda")
