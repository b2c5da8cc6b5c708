"""Noise, what the network is to predict, and the call of each family's network.

Every schedule is three tables over the training timesteps: ``x_t = alpha x + sigma noise``, and the time that the
network is told. Epsilon- and v-prediction (arXiv 2006.11239, 2202.00512) and flow matching (arXiv 2209.03003) differ in
these tables and in the target alone.

Symbols: N images, C channels, H x W latents, L text tokens, D width.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

Prediction = Literal["epsilon", "v_prediction", "flow"]


@dataclass(frozen=True)
class NoiseSchedule:
    """``alphas_T``, ``sigmas_T``: share of image and noise at each training timestep, noisier with the index.
    ``times_T``: what the network is told there."""

    prediction: Prediction
    alphas_T: Tensor
    sigmas_T: Tensor
    times_T: Tensor

    def __len__(self) -> int:
        return len(self.times_T)

    def noisy(self, latents: Tensor, noise: Tensor, index_N: Tensor) -> Tensor:
        """x_t of latents (N, C, H, W)."""
        return _rows(self.alphas_T, index_N, latents) * latents + _rows(self.sigmas_T, index_N, latents) * noise

    def target(self, latents: Tensor, noise: Tensor, index_N: Tensor) -> Tensor:
        """What the network should predict there: noise, velocity, or the flow from image to noise."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "flow":
            return noise - latents
        return _rows(self.alphas_T, index_N, latents) * noise - _rows(self.sigmas_T, index_N, latents) * latents


def noise_schedule(scheduler: Any) -> NoiseSchedule:
    """The tables of a diffusers scheduler, as it is configured.

    Raises:
        ValueError: it predicts something that no network here is trained for.
    """
    config = scheduler.config
    count = int(config.num_train_timesteps)
    if hasattr(scheduler, "alphas_cumprod"):
        prediction = config.get("prediction_type", "epsilon")
        if prediction not in ("epsilon", "v_prediction"):
            raise ValueError(
                f"{type(scheduler).__name__} has prediction_type {prediction!r}; epsilon, v_prediction and flow "
                "matching are supported: choose another base model"
            )
        kept_T = scheduler.alphas_cumprod.float()
        return NoiseSchedule(prediction, kept_T.sqrt(), (1 - kept_T).sqrt(), torch.arange(count))
    if type(scheduler).__name__.startswith("FlowMatch"):
        # As it was made, before any set_timesteps: the training steps, the noisiest first, shifted as configured.
        fresh = type(scheduler).from_config(config)
        sigmas_T = fresh.sigmas[:count].float().flip(0)
        return NoiseSchedule("flow", 1 - sigmas_T, sigmas_T, sigmas_T * count)
    raise ValueError(
        f"{type(scheduler).__name__} has neither alphas_cumprod nor flow matching's sigmas: set the pipeline's "
        "scheduler to DDPMScheduler, DDIMScheduler or FlowMatchEulerDiscreteScheduler"
    )


def draw_timesteps(schedule: NoiseSchedule, count: int, generator: torch.Generator) -> Tensor:
    """Indices of ``count`` timesteps: uniform, or logit-normal for flow matching (arXiv 2403.03206, mean 0, std 1)."""
    if schedule.prediction != "flow":
        return torch.randint(len(schedule), (count,), generator=generator)
    share = torch.randn(count, generator=generator).sigmoid()
    return (share * len(schedule)).long().clamp(max=len(schedule) - 1)


@dataclass(frozen=True)
class Conditioning:
    """What the images of a batch are made from, a row an image.

    Attributes:
        text_NLD: the encoded prompt, as the network's cross-attention takes it.
        pooled_NP: the pooled prompt (SDXL, SD3, FLUX).
        time_ids_N6: original size, crop and target size (SDXL).
        source_NCHW: latents of the image that is edited (InstructPix2Pix).
        user_NJ: the person's embedding; ``user_scale_N`` is 0 where there is nobody.
    """

    text_NLD: Tensor
    pooled_NP: Tensor | None = None
    time_ids_N6: Tensor | None = None
    source_NCHW: Tensor | None = None
    user_NJ: Tensor | None = None
    user_scale_N: Tensor | None = None


# (network, noisy latents, times, conditioning) -> prediction of the latents' shape
Predict = Callable[[nn.Module, Tensor, Tensor, Conditioning], Tensor]


def predict(network: nn.Module, family: str, noisy: Tensor, times_N: Tensor, given: Conditioning) -> Tensor:
    """The network's prediction, of the shape of ``noisy`` (N, C, H, W).

    Raises:
        ValueError: a family that is not supported, naming those that are.
    """
    if family not in PREDICT:
        raise ValueError(f"no call is known for networks of family {family!r}; supported: {', '.join(PREDICT)}")
    return PREDICT[family](network, noisy, times_N, given)


def _unet(network: nn.Module, noisy: Tensor, times_N: Tensor, given: Conditioning) -> Tensor:
    added: dict[str, Any] = {}
    if given.pooled_NP is not None:
        added = {"text_embeds": given.pooled_NP, "time_ids": given.time_ids_N6}
    if given.user_NJ is not None:
        added["image_embeds"] = [given.user_NJ[:, None]]
    if given.source_NCHW is not None:
        noisy = torch.cat([noisy, given.source_NCHW], dim=1)
    # Without return_dict the result is a tuple whatever diffusers names its class.
    return network(noisy, times_N, given.text_NLD, added_cond_kwargs=added or None, return_dict=False)[0]


def _sd3(network: nn.Module, noisy: Tensor, times_N: Tensor, given: Conditioning) -> Tensor:
    return network(
        hidden_states=noisy,
        timestep=times_N,
        encoder_hidden_states=given.text_NLD,
        pooled_projections=given.pooled_NP,
        return_dict=False,
    )[0]


def _flux(network: nn.Module, noisy: Tensor, times_N: Tensor, given: Conditioning) -> Tensor:
    count, channels, height, width = noisy.shape
    patches = noisy.view(count, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    packed = patches.reshape(count, height * width // 4, channels * 4)
    places = torch.zeros(height // 2, width // 2, 3, device=noisy.device, dtype=noisy.dtype)
    places[..., 1] += torch.arange(height // 2, device=noisy.device)[:, None]
    places[..., 2] += torch.arange(width // 2, device=noisy.device)[None]
    guided = network.config.guidance_embeds  # type: ignore[union-attr]
    found = network(
        hidden_states=packed,
        timestep=times_N / 1000,
        guidance=torch.ones_like(times_N) if guided else None,  # 1: no guidance is distilled while training
        encoder_hidden_states=given.text_NLD,
        pooled_projections=given.pooled_NP,
        txt_ids=torch.zeros(given.text_NLD.shape[1], 3, device=noisy.device, dtype=noisy.dtype),
        img_ids=places.view(-1, 3),
        return_dict=False,
    )[0]
    patches = found.view(count, height // 2, width // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(noisy.shape)


PREDICT: Mapping[str, Predict] = {"sd": _unet, "sdxl": _unet, "ip2p": _unet, "sd3": _sd3, "flux": _flux}


def _rows(table_T: Tensor, index_N: Tensor, like: Tensor) -> Tensor:
    return table_T.to(like)[index_N.to(like.device)].view(-1, *([1] * (like.dim() - 1)))
