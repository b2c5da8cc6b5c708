"""What of a base model is tuned, and what it is compared with: LoRA or all weights; adapter off, a copy, or a LoRA."""

import copy
import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig
from torch import nn

from palate.models.diffusion import LoadedDiffusion

TRAINED, REFERENCE = "default", "reference"
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # of U-Nets and of SD3's and FLUX's transformers


@dataclass(frozen=True)
class WeightsConfig:
    """Which weights are tuned, from where, and against what."""

    weights: Literal["lora", "full"] = "lora"
    """A LoRA, or all weights of the denoiser."""
    rank: int = 16
    """Of the LoRA."""
    alpha: float = 16.0
    """LoRA's alpha: the update is scaled by alpha / rank."""
    targets: tuple[str, ...] = ATTENTION
    """Linear layers that get a LoRA."""
    start_lora: str | None = None
    """Folder, safetensors file or hub id of a LoRA to start from, in any of diffusers' namings; its rank and layers
    hold."""
    reference_lora: str | None = None
    """LoRA that makes the reference, instead of the bare base model."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them."""


Reference = Callable[[], AbstractContextManager[nn.Module]]


def tuned(
    loaded: LoadedDiffusion, config: WeightsConfig, seed: int = 0, *, keep_reference: bool = True
) -> tuple[list[tuple[str, nn.Parameter]], Reference]:
    """The parameters to train, in the loaded denoiser itself, and the reference.

    Args:
        keep_reference: without, full weights come without a copy, and the reference is the network before training.

    Raises:
        ValueError: settings that do not go together, or no layer of the names in ``targets``.
    """
    network = loaded.denoiser
    network.requires_grad_(False)
    if config.gradient_checkpointing:
        network.enable_gradient_checkpointing()  # type: ignore[operator]
    if config.weights == "full":
        if config.start_lora or config.reference_lora:
            raise ValueError(
                "--start-lora and --reference-lora go with --weights lora; with full weights, fuse them first"
            )
        reference = copy.deepcopy(network).eval() if keep_reference else network
        network.float().requires_grad_(True)
        return list(network.named_parameters()), lambda: nullcontext(reference)
    torch.manual_seed(seed)  # PEFT draws A from the global generator
    if config.start_lora:
        load_lora(loaded, config.start_lora, TRAINED)
    else:
        shape = LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=list(config.targets))
        try:
            network.add_adapter(shape, adapter_name=TRAINED)  # type: ignore[operator]
        except ValueError as error:
            raise ValueError(f"no LoRA can be put on --targets {config.targets}: {error}") from None
    if config.reference_lora:
        load_lora(loaded, config.reference_lora, REFERENCE)
    network.set_adapters([TRAINED])  # type: ignore[operator]
    named = [(name, p) for name, p in network.named_parameters() if f".{TRAINED}." in name]
    for _, parameter in named:
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)

    @contextmanager
    def reference_of_adapter() -> Iterator[nn.Module]:
        if config.reference_lora:
            network.set_adapters([REFERENCE])  # type: ignore[operator]
        else:
            network.disable_adapters()  # type: ignore[operator]
        try:
            yield network
        finally:
            if not config.reference_lora:
                network.enable_adapters()  # type: ignore[operator]
            network.set_adapters([TRAINED])  # type: ignore[operator]
            for _, parameter in named:
                parameter.requires_grad_(True)

    return named, reference_of_adapter


def lora_digest(path: str) -> str | None:
    """The SHA-256 of a local LoRA's safetensors files; None of a hub id, which names its weights."""
    file = Path(path)
    files = [file] if file.is_file() else sorted(file.glob("*.safetensors"))
    if not files:
        return None
    return hashlib.sha256(b"".join(hashlib.sha256(one.read_bytes()).digest() for one in files)).hexdigest()


def load_lora(loaded: LoadedDiffusion, path: str, name: str) -> None:
    """Load a LoRA into the denoiser as adapter ``name``; a LoRA of the text encoders is left out.

    Raises:
        ValueError: nothing of it fits this denoiser, there is no such file, or it is no safetensors.
    """
    pipeline: Any = loaded.pipeline
    folder = Path(path)
    if not folder.exists() and ("/" in path[1:] and path.startswith((".", "/"))):
        raise ValueError(f"{path}: no such folder or file; give a LoRA's folder, its safetensors file, or a hub id")
    if folder.is_file() and folder.suffix != ".safetensors":  # diffusers would unpack a named file of any other kind
        raise ValueError(
            f"{path} is a file of the kind {folder.suffix!r}; a LoRA is read from .safetensors only: convert"
        )
    keywords = {"weight_name": folder.name} if folder.is_file() else {}
    try:
        found = pipeline.lora_state_dict(
            str(folder.parent if folder.is_file() else path),
            use_safetensors=True,
            return_lora_metadata=True,
            **keywords,
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a LoRA: {error}") from error
    # U-Nets' readers give alphas as well, transformers' may not.
    tensors, alphas, metadata = found if len(found) == 3 else (found[0], None, found[1])
    own = {key: tensor for key, tensor in tensors.items() if key.startswith(f"{loaded.denoiser_name}.")}
    if not own:
        parts = sorted({key.partition(".")[0] for key in tensors})[:5]
        raise ValueError(f"{path} holds no LoRA of the {loaded.denoiser_name}, only of {', '.join(parts)}")
    loaded.denoiser.load_lora_adapter(  # type: ignore[operator]
        own, prefix=loaded.denoiser_name, network_alphas=alphas or None, metadata=metadata, adapter_name=name
    )
