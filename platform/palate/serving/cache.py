"""The engine's key-value cache: one slot a row, each row with its own length, written in place.

It is a transformers ``Cache``, so that any decoder-only model with standard attention runs on it. Before a forward
pass the engine says which slots and positions the pass is about; the cache writes the new keys and values there and
hands attention a view of those slots, cut at the longest of them. Nothing is copied but the rows that ``move`` moves.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, PretrainedConfig
from transformers.cache_utils import CacheLayerMixin


class _SlotLayer(CacheLayerMixin):
    """Keys and values of one decoder layer, each (slots, heads, max_length, head_width)."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.is_initialized = True
        self.slots = slice(0, 0)
        self.start = 0  # how many positions came before this pass (the most, if the rows differ)
        self.positions_B: Tensor | None = None  # decoding: the position of each row's one new token

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is left to do: the memory is there from the start."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write (B, heads, T, width) at the announced place; the view (B, heads, start + T, width) to attend to."""
        keys, values = self.keys[self.slots], self.values[self.slots]
        end = self.start + key_states.shape[2]
        if self.positions_B is None:
            keys[:, :, self.start : end] = key_states
            values[:, :, self.start : end] = value_states
        else:
            rows_B = torch.arange(keys.shape[0], device=keys.device)
            keys[rows_B, :, self.positions_B] = key_states[:, :, 0]
            values[rows_B, :, self.positions_B] = value_states[:, :, 0]
        return keys[:, :, :end], values[:, :, :end]

    def get_seq_length(self) -> int:
        return self.start

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.start + query_length, 0

    def get_max_length(self) -> int:
        return self.keys.shape[2]


class SlotCache(Cache):
    """Memory for ``slots`` rows of up to ``max_length`` tokens, of a model with this ``config``.

    Raises:
        ValueError: attention of another kind than full causal attention, a length beyond the model's positions, or
            more memory than the device has left.
    """

    def __init__(
        self, config: PretrainedConfig, slots: int, max_length: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        _require_full_attention(config, max_length)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (config.num_hidden_layers, 2, slots, heads, max_length, width)
        self.bytes = int(np.prod(shape)) * dtype.itemsize
        available = available_memory(device)
        if available is not None and self.bytes > available:
            raise ValueError(
                f"a cache of {slots} slots of {max_length} tokens takes {self.bytes / 2**20:.0f} MiB, and {device} has "
                f"{available / 2**20:.0f} MiB left: lower slots or max_length"
            )
        # Zeros, because attention reads (with weight 0) what lies beyond a short row's end, and 0 times NaN is NaN.
        # On the CPU numpy's zeros: the system backs them with memory only where they are written to.
        if device.type == "cpu":
            self._states = torch.from_numpy(np.zeros(self.bytes, dtype=np.uint8)).view(dtype).view(shape)
        else:
            self._states = torch.zeros(shape, dtype=dtype, device=device)
        self.max_length = max_length
        super().__init__(layers=[_SlotLayer(keys, values) for keys, values in self._states])

    def prefill(self, slots: slice, start: int) -> None:
        """The next pass is about the tokens from position ``start`` on, of rows that all have ``start`` tokens."""
        self._announce(slots, start, None)

    def decode(self, count: int, positions_B: Tensor, longest: int) -> None:
        """The next pass is about one token of each of the first ``count`` slots; ``longest`` is the last position."""
        self._announce(slice(0, count), longest, positions_B)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` tokens of one slot to another."""
        self._states[:, :, target, :, :length] = self._states[:, :, source, :, :length]

    def clear(self, slot: int, length: int) -> None:
        """Overwrite the first ``length`` tokens of a slot, if they may be NaN: the next row there will read them."""
        self._states[:, :, slot, :, :length] = 0

    def _announce(self, slots: slice, start: int, positions_B: Tensor | None) -> None:
        for layer in self.layers:
            layer.slots, layer.start, layer.positions_B = slots, start, positions_B


def available_memory(device: torch.device) -> int | None:
    """Bytes that can still be taken on the device; None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None


def _require_full_attention(config: PretrainedConfig, max_length: int) -> None:
    attention = config._attn_implementation
    if attention not in ("sdpa", "eager"):
        raise ValueError(f"the engine needs a model with attn_implementation 'sdpa' or 'eager', found {attention!r}")
    window = getattr(config, "sliding_window", None)
    kinds = (
        getattr(config, "layer_types", None)
        or ["full_attention" if window is None else "sliding_attention"] * config.num_hidden_layers
    )
    # A window that no row can outgrow is full attention.
    fits = window is not None and window >= max_length
    if wrong := [kind for kind in kinds if kind != "full_attention" and not (kind == "sliding_attention" and fits)]:
        raise ValueError(
            f"{config.model_type} has layers of kind {wrong[0]!r} (window {window}), and the engine serves full causal "
            f"attention: choose another base model, or a max_length up to the window"
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and max_length > positions:
        raise ValueError(f"max_length {max_length} is beyond the {positions} positions of this {config.model_type}")
