"""Frozen sentence encoders from the hub, as an embedding of people's style: any transformers encoder, mean-pooled.

The arithmetic is sentence-transformers' (arXiv 1908.10084, section 3): the mean of the last hidden states over the
tokens that are no padding, and optionally a norm of one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from palate import artifacts, progress


@dataclass(frozen=True)
class Encoder:
    """An encoder in eval mode with its tokenizer. Texts are cut at ``max_length`` tokens."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    max_length: int
    normalize: bool = True

    @property
    def width(self) -> int:
        return int(self.model.config.hidden_size)

    @torch.inference_mode()
    def embed(self, texts: Sequence[str], batch_tokens: int = 8192) -> np.ndarray:
        """Embeddings of texts, shape (texts, width), in order; float32.

        Texts of similar length share a batch of at most ``batch_tokens`` tokens, padding included, so that little is
        computed on padding. A text of no token, which only a tokenizer without special tokens makes, gets zeros.
        """
        ids = [
            self.tokenizer(text, truncation=True, max_length=self.max_length).input_ids
            for text in progress.track(texts, "tokenizing")
        ]
        embedded = np.zeros((len(texts), self.width), np.float32)
        with progress.meter("embedding texts", len(texts), unit="text") as bar:
            for batch in _batches([len(one) for one in ids], batch_tokens):
                embedded[batch] = self._forward([ids[number] for number in batch]).cpu().numpy()
                bar.update(len(batch))
        return embedded

    def embed_histories(self, histories: Sequence[Sequence[str]]) -> np.ndarray:
        """Embeddings of people, shape (people, width): the mean of each one's texts, zeros for who has none."""
        embedded = self.embed([text for texts in histories for text in texts])
        ends = np.cumsum([len(texts) for texts in histories], dtype=int)
        people = np.zeros((len(histories), self.width), np.float32)
        for number, (end, texts) in enumerate(zip(ends, histories, strict=True)):
            if texts:
                people[number] = embedded[end - len(texts) : end].mean(0)
        return people

    def _forward(self, ids: Sequence[Sequence[int]]) -> Tensor:
        longest = max(map(len, ids))
        padding = self.tokenizer.pad_token_id or 0  # what stands in a masked place does not matter
        input_BT = torch.tensor([[*one, *[padding] * (longest - len(one))] for one in ids])
        mask_BT = torch.tensor([[1] * len(one) + [0] * (longest - len(one)) for one in ids])
        device = self.model.device
        states_BTd = self.model(input_ids=input_BT.to(device), attention_mask=mask_BT.to(device)).last_hidden_state
        return pool(states_BTd, mask_BT.to(device), self.normalize)


def pool(states_BTd: Tensor, mask_BT: Tensor, normalize: bool) -> Tensor:
    """Means (B, d) of the hidden states where the mask is 1, in float32; to norm one if asked."""
    mask_BT1 = mask_BT[:, :, None].float()
    mean_Bd = (states_BTd.float() * mask_BT1).sum(1) / mask_BT1.sum(1).clamp(min=1)
    return F.normalize(mean_Bd, dim=1) if normalize else mean_Bd


def load_encoder(
    name: str,
    *,
    normalize: bool = True,
    max_length: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Encoder:
    """The encoder called ``name``: a hub id such as ``sentence-transformers/all-MiniLM-L6-v2``, or a local folder.

    Args:
        max_length: in tokens; by default what the tokenizer and the model's positions allow, at most 512.

    Raises:
        ValueError: there is no such encoder, or it is incomplete.
        ArtifactError: it is a URL, and there is no such folder, or it is damaged.
    """
    place = artifacts.model_source(name)
    folder = Path(place).expanduser()
    source = str(folder) if folder.is_dir() else place
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model, report = AutoModel.from_pretrained(source, dtype=dtype, output_loading_info=True, use_safetensors=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"--encoder {name} cannot be loaded: {error}\nAn encoder is `stylometric`, a hub id such as "
            "sentence-transformers/all-MiniLM-L6-v2, or a local folder"
        ) from error
    # A pooling layer that the checkpoint does not have is not used here.
    if missing := sorted(key for key in report["missing_keys"] if not key.startswith("pooler.")):
        raise ValueError(f"--encoder {name} lacks {len(missing)} weights, such as {missing[0]}: it is incomplete")
    positions = getattr(model.config, "max_position_embeddings", 512)
    length = max_length or min(tokenizer.model_max_length, positions, 512)
    return Encoder(model.eval().to(device), tokenizer, name, length, normalize)


def _batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Numbers of texts, longest first, so many together that padding to the longest stays within the limit."""
    batches: list[list[int]] = []
    longest = 0
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        if lengths[number] == 0:
            break
        if not batches or (len(batches[-1]) + 1) * longest > batch_tokens:
            batches.append([])
            longest = lengths[number]
        batches[-1].append(number)
    return batches
