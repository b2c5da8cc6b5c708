"""Packed LoRA: the adapters of all clusters in one layer.

``y = W x + ((x A_cat) * row_mask) B_cat`` with A_cat (d_in, K·r) and B_cat (K·r, d_out). A row's mask selects its
adapter's r columns and carries its alpha/r, so one forward pass serves rows of any adapters, and of none, at two thin
matmuls a layer. A and B are K parameters each, concatenated for the matmul, so that a cluster without rows in a batch
can be left without a gradient (LoRA: arXiv 2106.09685; the format on disk is PEFT's).
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

ATTENTION = ("q_proj", "v_proj")
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BASE = -1  # the adapter index of a row that runs on the bare base model
SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # the first called first
MASKED_UP_TO = 128  # K·r; measured by benchmarks/packed_lora.py


@dataclass(frozen=True)
class LoraConfig:
    """Shape of every adapter. ``targets`` are names of linear layers, as PEFT's ``target_modules``."""

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ALL_LINEAR


@dataclass(frozen=True)
class RowsInUse:
    """The adapters of a batch in the two forms that products need.

    ``mask_BR`` (B, K·r) holds the scale of the row's adapter in its columns, else 0. ``index_B`` and ``scale_B`` are
    each row's adapter and its scale: 0 and 0 for a base row.
    """

    mask_BR: Tensor
    index_B: Tensor
    scale_B: Tensor


class RowMask:
    """Which adapter each row of the running batch uses; one object shared by all packed layers of a model."""

    def __init__(self, count: int, rank: int, scalings_K: Tensor) -> None:
        self.count, self.rank, self.scalings_K = count, rank, scalings_K
        self.in_use: RowsInUse | None = None  # None: no row uses an adapter

    def set(self, adapter_index_B: Tensor | None) -> None:
        """Assign adapters to rows: shape (B,), values 0..K-1, or -1 for the bare base model."""
        if adapter_index_B is None or bool((adapter_index_B == BASE).all()):
            self.in_use = None
            return
        if int(adapter_index_B.max()) >= self.count or int(adapter_index_B.min()) < BASE:
            raise ValueError(
                f"adapter indices must lie in -1..{self.count - 1}, found {int(adapter_index_B.min())}.."
                f"{int(adapter_index_B.max())}: the batch names a cluster that this model has no adapter for"
            )
        scalings_K = self.scalings_K.to(adapter_index_B.device)
        one_hot_BK = (adapter_index_B[:, None] == torch.arange(self.count, device=adapter_index_B.device)) * scalings_K
        self.in_use = RowsInUse(
            mask_BR=one_hot_BK.repeat_interleave(self.rank, dim=1),
            index_B=adapter_index_B.clamp(min=0),
            scale_B=one_hot_BK.sum(dim=1),
        )


class PackedLinear(nn.Module):
    """A frozen linear layer with K low-rank adapters beside it."""

    def __init__(self, base: nn.Linear, rows: RowMask, generator: torch.Generator) -> None:
        super().__init__()
        self.base = base
        self.rows = rows
        d_in, d_out, rank, where = base.in_features, base.out_features, rows.rank, base.weight.device
        # PEFT's start: A as a linear layer's weights, B zero, so that every adapter begins as the base model.
        bound = 1 / math.sqrt(d_in)
        self.A = nn.ParameterList(
            ((torch.rand(d_in, rank, generator=generator) * 2 - 1) * bound).to(where) for _ in range(rows.count)
        )
        self.B = nn.ParameterList(torch.zeros(rank, d_out, device=where) for _ in range(rows.count))
        self.readers = Readers([self])

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        in_use = self.rows.in_use
        if in_use is None:
            return y
        if not torch.is_grad_enabled():
            return self.readers.add_update(y, x, self, in_use)
        self.readers.forget()  # a training step comes next
        mask_BR = in_use.mask_BR
        A_cat, B_cat = torch.cat(list(self.A), dim=1), torch.cat(list(self.B), dim=0)
        mask = mask_BR.to(A_cat.dtype).view(mask_BR.shape[0], *([1] * (x.dim() - 2)), -1)
        return y + (((x.to(A_cat.dtype) @ A_cat) * mask) @ B_cat).to(y.dtype)


class Readers:
    """Packed layers that read the same tensor, as q, k and v do: without gradients they share one product with A.

    The product is kept from the first of them to the last. Up to K·r = ``MASKED_UP_TO`` all adapters are multiplied
    and the row mask chooses; above, each row is multiplied with its own adapter's factors only.
    """

    def __init__(self, layers: list[PackedLinear]) -> None:
        self.layers, self.rows = layers, layers[0].rows
        self.masked = self.rows.count * self.rows.rank <= MASKED_UP_TO
        self._made_for: tuple[Tensor, Tensor] | None = None
        self._products: list[Tensor] = []
        self.forget()

    def forget(self) -> None:
        """Drop the factors: parameters may have been replaced. Those that are written to in place are noticed."""
        self._factors: tuple[Tensor, list[Tensor]] | None = None
        self._parameters: list[nn.Parameter] = []
        self._versions: list[int] = []

    def add_update(self, y: Tensor, x: Tensor, layer: PackedLinear, rows: "RowsInUse") -> Tensor:
        """``y`` (B, ..., d_out) plus the update of each row's adapter to x (B, ..., d_in); may write into ``y``."""
        A, Bs = self._current_factors()
        if self._made_for is None or self._made_for[0] is not x or self._made_for[1] is not rows.index_B:
            self._made_for, self._products = (x, rows.index_B), self._multiply(x.to(A.dtype), A, rows)
        which = self.layers.index(layer)
        product, B = self._products[which], Bs[which]
        if which == len(self.layers) - 1:
            self._made_for, self._products = None, []
        total = y.to(B.dtype)
        if self.masked:
            total.view(-1, B.shape[-1]).addmm_(product, B)
        else:
            total.view(len(product), -1, B.shape[-1]).baddbmm_(product, B[rows.index_B])
        return total.to(y.dtype)

    def _multiply(self, x: Tensor, A: Tensor, rows: "RowsInUse") -> list[Tensor]:
        """One scaled product with A a layer: (tokens, K·r) masked, or (B, T, r) with the row's own adapter."""
        x_BTd, shape = x.reshape(x.shape[0], -1, x.shape[-1]), (len(self.layers), -1)
        if self.masked:
            products = (x_BTd @ A).unflatten(2, shape).mul_(rows.mask_BR.to(A.dtype)[:, None, None])
            return list(products.flatten(0, 1).unbind(1))
        products = torch.bmm(x_BTd, A[rows.index_B]).mul_(rows.scale_B.to(A.dtype)[:, None, None])
        return list(products.unflatten(2, shape).unbind(2))

    def _current_factors(self) -> tuple[Tensor, list[Tensor]]:
        """The layers' A side by side, and each layer's B; made again after a parameter was written to."""
        if self._factors is None or self._versions != [p._version for p in self._parameters]:
            self._parameters = [p for layer in self.layers for p in (*layer.A, *layer.B)]
            self._versions = [p._version for p in self._parameters]
            if self.masked:  # (d_in, layers·K·r), (K·r, d_out)
                A = torch.cat([a for layer in self.layers for a in layer.A], dim=1)
                Bs = [torch.cat(list(layer.B)) for layer in self.layers]
            else:  # (K, d_in, layers·r), (K, r, d_out)
                A = torch.cat([torch.stack(list(layer.A)) for layer in self.layers], dim=2)
                Bs = [torch.stack(list(layer.B)) for layer in self.layers]
            self._factors = A.detach(), [B.detach() for B in Bs]
        return self._factors


def pack(model: nn.Module, count: int, config: LoraConfig, seed: int = 0) -> RowMask:
    """Freeze ``model`` and put ``count`` adapters beside each target layer, in place.

    Raises:
        ValueError: no layer has one of the target names.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    rows = RowMask(count, config.rank, torch.full((count,), config.alpha / config.rank))
    generator = torch.Generator().manual_seed(seed)
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in config.targets
    ]
    if not targets:
        linear = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise ValueError(f"no linear layer is named like {config.targets}; this model has {linear}: change --targets")
    for name in targets:
        parent, _, leaf = name.rpartition(".")
        owner = model.get_submodule(parent)
        layer = getattr(owner, leaf)
        setattr(owner, leaf, PackedLinear(layer, rows, generator))
    for module in model.modules():
        for names in SAME_INPUT:
            layers = [layer for name in names if isinstance(layer := getattr(module, name, None), PackedLinear)]
            if len({layer.base.in_features for layer in layers}) == 1:
                readers = Readers(layers)
                for layer in layers:
                    layer.readers = readers
    return rows


def packed_layers(model: nn.Module) -> Iterator[tuple[str, PackedLinear]]:
    """Every packed layer with the name that its linear layer had in the base model."""
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            yield name, module


def cluster_parameters(model: nn.Module, cluster: int) -> list[tuple[str, nn.Parameter]]:
    """The parameters of one cluster's adapter, named as in the model."""
    named = []
    for name, layer in packed_layers(model):
        named.append((f"{name}.A.{cluster}", layer.A[cluster]))
        named.append((f"{name}.B.{cluster}", layer.B[cluster]))
    return named


def export_adapter(model: nn.Module, cluster: int, config: LoraConfig, folder: Path, base_model: str) -> None:
    """Write one cluster's adapter as a PEFT folder that plain ``peft`` loads."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, layer in packed_layers(model):
        tensors[f"base_model.model.{name}.lora_A.weight"] = layer.A[cluster].detach().t().contiguous().cpu()
        tensors[f"base_model.model.{name}.lora_B.weight"] = layer.B[cluster].detach().t().contiguous().cpu()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    description = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(config.targets),
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "fan_in_fan_out": False,
    }
    (folder / "adapter_config.json").write_text(json.dumps(description, indent=2) + "\n")


def import_adapter(model: nn.Module, rows: RowMask, cluster: int, folder: Path) -> None:
    """Load a PEFT LoRA, made here or elsewhere, as a cluster's adapter.

    A lower rank is padded with zeros; layers that the adapter leaves out get a zero update; its own alpha (and
    rank-stabilized scaling, arXiv 2312.03732) is kept in the row's scale.

    Raises:
        ValueError: not a plain LoRA, a rank above the packed one, layers or widths that this model has not.
    """
    description = json.loads((folder / "adapter_config.json").read_text())
    _require_plain_lora(description, folder)
    rank = description["r"]
    if rank > rows.rank:
        raise ValueError(f"{folder} has rank {rank}, above the packed rank {rows.rank}: pack with --rank {rank}")
    tensors = load_file(folder / "adapter_model.safetensors")
    if bad := next((name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()), None):
        raise ValueError(f"{folder}: tensor {bad} holds NaN or infinite values; the adapter cannot be used")
    layers = dict(packed_layers(model))
    found = _by_layer(tensors, folder)
    if unknown := sorted(found.keys() - layers.keys()):
        raise ValueError(
            f"{folder} adapts layer {unknown[0]!r}, which is not packed in this model: check --model and --targets"
        )
    with torch.no_grad():
        for name, layer in layers.items():
            A, B = layer.A[cluster], layer.B[cluster]
            A.zero_()
            B.zero_()
            if name in found:
                a, b = found[name]["A"].t(), found[name]["B"].t()
                if a.shape != (A.shape[0], rank) or b.shape != (rank, B.shape[1]):
                    raise ValueError(
                        f"{folder}: layer {name} has A {tuple(a.shape)} and B {tuple(b.shape)}, this model needs "
                        f"({A.shape[0]}, {rank}) and ({rank}, {B.shape[1]}): it was made for another base model"
                    )
                A[:, :rank] = a.to(A)
                B[:rank] = b.to(B)
    divisor = math.sqrt(rank) if description.get("use_rslora") else rank
    rows.scalings_K[cluster] = description["lora_alpha"] / divisor


def load_adapters(model: nn.Module, folders: Sequence[Path]) -> RowMask:
    """Pack as many adapters as there are PEFT folders, at the largest rank among them, ready for decoding."""
    descriptions = [json.loads((folder / "adapter_config.json").read_text()) for folder in folders]
    targets = {name.rpartition(".")[2] for description in descriptions for name in description["target_modules"]}
    config = LoraConfig(rank=max(d["r"] for d in descriptions), targets=tuple(sorted(targets)))
    rows = pack(model, len(folders), config)
    for cluster, folder in enumerate(folders):
        import_adapter(model, rows, cluster, folder)
    for _, layer in packed_layers(model):
        layer.requires_grad_(False)
    return rows


def _require_plain_lora(description: Mapping[str, object], folder: Path) -> None:
    if description.get("peft_type") != "LORA":
        raise ValueError(
            f"{folder} is a {description.get('peft_type')!r} adapter; only LORA can be a cluster's adapter"
        )
    for field in ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias", "fan_in_fan_out"):
        if description.get(field):
            raise ValueError(f"{folder} uses {field}={description[field]!r}, which a packed adapter cannot hold")
    if description.get("bias", "none") != "none":
        raise ValueError(f"{folder} trains biases ({description['bias']!r}), which a packed adapter cannot hold")


def _by_layer(tensors: Mapping[str, Tensor], folder: Path) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, matched, rest = key.removeprefix("base_model.model.").rpartition(".lora_")
        side = rest.removesuffix(".weight")
        if not matched or side not in ("A", "B"):
            raise ValueError(f"{folder}: tensor {key!r} is not a LoRA weight of a linear layer")
        found.setdefault(name, {})[side] = tensor
    return found
