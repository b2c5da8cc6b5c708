"""Noise schedules and networks' calls against diffusers' own schedulers and pipelines."""

from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    HeunDiscreteScheduler,
)

from palate.lpo.denoising import Conditioning, draw_timesteps, noise_schedule, predict


def images(count: int = 5, channels: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, count, channels, 8, 8, generator=generator).unbind()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_diffusion_schedules_equal_the_schedulers(prediction: str, zero_snr: bool) -> None:
    scheduler = DDPMScheduler(
        beta_schedule="scaled_linear", prediction_type=prediction, rescale_betas_zero_snr=zero_snr
    )
    schedule = noise_schedule(scheduler)
    latents, noise = images()
    index = torch.tensor([0, 1, 499, 998, 999])
    torch.testing.assert_close(schedule.noisy(latents, noise, index), scheduler.add_noise(latents, noise, index))
    expected = noise if prediction == "epsilon" else scheduler.get_velocity(latents, noise, index)
    torch.testing.assert_close(schedule.target(latents, noise, index), expected)
    assert schedule.times_T[index].tolist() == index.tolist()


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_flow_schedule_equals_the_schedulers(shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    schedule = noise_schedule(scheduler)
    latents, noise = images()
    index = torch.tensor([0, 10, 499, 998, 999])
    times = schedule.times_T[index]
    torch.testing.assert_close(schedule.noisy(latents, noise, index), scheduler.scale_noise(latents, times, noise))
    torch.testing.assert_close(schedule.target(latents, noise, index), noise - latents)
    # A step of the sampler along the target ends at the image.
    assert schedule.sigmas_T[-1] == 1
    assert (schedule.sigmas_T.diff() > 0).all()


def test_schedules_ignore_what_sampling_has_set() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    before = noise_schedule(scheduler)
    scheduler.set_timesteps(4)
    assert torch.equal(noise_schedule(scheduler).times_T, before.times_T)


def test_timesteps_are_uniform_or_logit_normal() -> None:
    generator = torch.Generator().manual_seed(0)
    uniform = draw_timesteps(noise_schedule(DDIMScheduler()), 20_000, generator)
    assert (uniform.min(), uniform.max()) == (0, 999)
    shares = torch.histc(uniform.float(), 4, 0, 1000) / 20_000
    assert ((shares - 0.25).abs() < 0.02).all()
    flow = draw_timesteps(noise_schedule(FlowMatchEulerDiscreteScheduler()), 20_000, generator)
    # P(sigmoid(z) < 1/4) = P(z < -ln 3) for a standard normal z: 0.1360.
    assert abs((flow < 250).float().mean() - 0.1360) < 0.01
    assert abs((flow < 500).float().mean() - 0.5) < 0.015


@pytest.mark.parametrize(
    "scheduler", [DDPMScheduler(prediction_type="sample"), DDIMScheduler(prediction_type="sample")]
)
def test_other_predictions_are_refused(scheduler: Any) -> None:
    with pytest.raises(ValueError, match="prediction_type 'sample'"):
        noise_schedule(scheduler)


def test_schedulers_with_alphas_serve_whatever_their_sampler() -> None:
    betas: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    expected = noise_schedule(DDPMScheduler(**betas)).alphas_T
    for scheduler in (EulerDiscreteScheduler, HeunDiscreteScheduler):
        assert torch.equal(noise_schedule(scheduler(**betas)).alphas_T, expected)


@torch.no_grad()
@pytest.mark.parametrize("guided", [False, True])
def test_flux_packs_as_its_pipeline_does(guided: bool) -> None:
    torch.manual_seed(0)
    network = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=guided,
    )
    noisy, _ = images(2)
    times = torch.tensor([10.0, 900.0])
    given = Conditioning(torch.randn(2, 7, 24), torch.randn(2, 20))
    found = predict(network, "flux", noisy, times, given)
    theirs = network(
        hidden_states=FluxPipeline._pack_latents(noisy, 2, 4, 8, 8),
        timestep=times / 1000,
        guidance=torch.ones(2) if guided else None,
        encoder_hidden_states=given.text_NLD,
        pooled_projections=given.pooled_NP,
        txt_ids=torch.zeros(7, 3),
        img_ids=FluxPipeline._prepare_latent_image_ids(2, 4, 4, noisy.device, noisy.dtype),
    ).sample
    expected = FluxPipeline._unpack_latents(theirs, 64, 64, 8).view_as(noisy)
    torch.testing.assert_close(found, expected)


def test_unknown_families_are_named() -> None:
    with pytest.raises(ValueError, match="'kandinsky'; supported: sd, sdxl, ip2p, sd3, flux"):
        predict(torch.nn.Identity(), "kandinsky", *images(1), Conditioning(torch.zeros(1, 1, 1)))
