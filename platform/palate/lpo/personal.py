"""A person's taste in a diffusion model: an embedding, read by decoupled cross-attention (PPD, arXiv 2501.06655).

Beside every attention to the text, ``softmax(Q K'ᵀ) V'`` over four tokens that are made from the person's embedding is
added, scaled (IP-Adapter, arXiv 2308.06721). What is trained is stored as an IP-Adapter, so that plain diffusers runs
it: ``pipeline.load_ip_adapter(folder, "", "ip_adapter.safetensors", image_encoder_folder=None)`` and the person's row
of ``users.safetensors`` as ``ip_adapter_image_embeds``. Without a person the branch is skipped, so a stranger gets the
base model's image bit for bit. Guidance is of the text alone: give the same embedding for both of its sides.

Symbols: N images, J width of an embedding, U people.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from palate.lpo.denoising import Conditioning

ADAPTER, USERS = "ip_adapter.safetensors", "users.safetensors"
TOKENS = 4  # what diffusers takes an IP-Adapter of this form to have


class RowScale:
    """The strength of the branch for each image of a batch, in the place of diffusers' one number."""

    def __init__(self, scale_N: Tensor) -> None:
        self.scale_N = scale_N
        self.nobody = not bool(scale_N.any())

    def __eq__(self, other: object) -> bool:  # diffusers skips the branch where this equals 0
        return other == 0 and self.nobody

    __hash__ = None  # type: ignore[assignment]

    def __mul__(self, states_NTd: Tensor) -> Tensor:
        return self.scale_N.to(states_NTd)[:, None, None] * states_NTd


def add_branch(network: nn.Module, width: int, seed: int = 0) -> None:
    """Put the branch beside every attention to the text of a U-Net, in place; it adds nothing at first.

    Keys begin as the text's, values at zero. All else is frozen.

    Raises:
        ValueError: a network of another kind.
    """
    processors = getattr(network, "attn_processors", {})
    crossing = [name for name in processors if name.endswith("attn2.processor")]
    if not crossing or not hasattr(network, "_load_ip_adapter_weights"):
        raise ValueError(
            f"personal tuning needs a U-Net with attention to the text, found {type(network).__name__}: choose a base "
            "model of family sd, sdxl or ip2p"
        )
    network.requires_grad_(False)
    unet: Any = network
    d_text = unet.config.cross_attention_dim
    generator = torch.Generator().manual_seed(seed)
    projection = torch.randn(TOKENS * d_text, width, generator=generator) / width**0.5
    image_proj = {
        "proj.weight": projection,
        "proj.bias": torch.zeros(TOKENS * d_text),
        "norm.weight": torch.ones(d_text),
        "norm.bias": torch.zeros(d_text),
    }
    ip_adapter = {}
    for place, name in enumerate(processors):
        if name in crossing:
            keys = unet.get_submodule(name.removesuffix(".processor")).to_k.weight
            ip_adapter[f"{place}.to_k_ip.weight"] = keys.detach().float().clone()
            ip_adapter[f"{place}.to_v_ip.weight"] = torch.zeros_like(ip_adapter[f"{place}.to_k_ip.weight"])
    _load(network, {"image_proj": image_proj, "ip_adapter": ip_adapter})


def branch_parameters(network: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """What the branch learns, beside embeddings; made trainable."""
    named = [
        (name, parameter)
        for name, parameter in network.named_parameters()
        if "_ip." in name or name.startswith("encoder_hid_proj.")
    ]
    for _, parameter in named:
        parameter.requires_grad_(True)
    return named


def set_people(network: nn.Module, scale_N: Tensor) -> None:
    """Say how strongly the next pass takes the person of each image; 0 is nobody."""
    unet: Any = network
    for processor in unet.attn_processors.values():
        if hasattr(processor, "to_k_ip"):
            processor.scale = [RowScale(scale_N)]


class People(nn.Module):
    """The embeddings of U people, (U, J): learned, or given and frozen."""

    def __init__(self, ids: Sequence[str], embeddings_UJ: Tensor, *, learned: bool) -> None:
        super().__init__()
        self.ids = tuple(ids)
        self.places: Mapping[str, int] = {user: place for place, user in enumerate(ids)}
        self.embeddings_UJ = nn.Parameter(embeddings_UJ.float(), requires_grad=learned)

    def given(self, network: nn.Module, conditioning: Conditioning) -> Conditioning:
        """The conditioning with embeddings in place of people's places, the network told whom to take."""
        if conditioning.user_NJ is None or conditioning.user_scale_N is None:
            raise ValueError("a personal network needs the person of each image, or a scale of 0")
        set_people(network, conditioning.user_scale_N)
        places_N = conditioning.user_NJ[:, 0].long()
        return replace(conditioning, user_NJ=self.embeddings_UJ[places_N])


def new_people(ids: Sequence[str], width: int, seed: int = 0) -> People:
    """People with small random embeddings, to be learned."""
    embeddings = torch.randn(len(ids), width, generator=torch.Generator().manual_seed(seed))
    return People(ids, embeddings, learned=True)


def save_branch(network: nn.Module, people: People, folder: Path) -> None:
    """Write the branch as an IP-Adapter, and the people's embeddings beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    unet: Any = network
    for place, processor in enumerate(unet.attn_processors.values()):
        if hasattr(processor, "to_k_ip"):
            tensors[f"ip_adapter.{place}.to_k_ip.weight"] = processor.to_k_ip[0].weight
            tensors[f"ip_adapter.{place}.to_v_ip.weight"] = processor.to_v_ip[0].weight
    projection = unet.encoder_hid_proj.image_projection_layers[0]
    for name, tensor in projection.state_dict().items():
        tensors[f"image_proj.{name.replace('image_embeds', 'proj')}"] = tensor
    save_file({name: _whole(tensor) for name, tensor in tensors.items()}, folder / ADAPTER, metadata={"format": "pt"})
    save_people(people, folder)


def save_people(people: People, folder: Path) -> None:
    """Write the embeddings and whose they are."""
    save_file({"embeddings": _whole(people.embeddings_UJ)}, folder / USERS, metadata={"ids": json.dumps(people.ids)})


def load_people(folder: Path) -> People:
    """What ``save_people`` wrote; frozen."""
    with safe_open(folder / USERS, framework="pt") as file:
        return People(json.loads(file.metadata()["ids"]), file.get_tensor("embeddings"), learned=False)


def load_branch(network: nn.Module, folder: Path) -> People:
    """Put a stored branch into a network, and its people; frozen.

    Raises:
        FileNotFoundError: a file is missing, naming it.
    """
    for name in (ADAPTER, USERS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}: give the folder that personal tuning wrote")
    state: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for name, tensor in load_file(folder / ADAPTER).items():
        part, _, rest = name.partition(".")
        state[part][rest] = tensor
    _load(network, state)
    return load_people(folder)


def _load(network: nn.Module, state: Mapping[str, Mapping[str, Tensor]]) -> None:
    # Without accelerate's empty tensors, so that what is given here is what is trained.
    network._load_ip_adapter_weights([state], low_cpu_mem_usage=False)  # type: ignore[operator]


def _whole(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu().contiguous().clone()
