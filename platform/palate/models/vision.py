"""Loading a frozen vision encoder (hub id or folder) with its image processor."""

from dataclasses import dataclass
from typing import Any

from safetensors import SafetensorError
from transformers import AutoImageProcessor, AutoModel, PreTrainedModel

from palate import artifacts

_NAMES = (
    "a hub id such as facebook/dinov2-base or google/siglip-base-patch16-224, a local folder, or the URL of one in a "
    "finished artifact"
)


@dataclass(frozen=True)
class VisionEncoder:
    """A vision transformer in eval mode, and what makes pixel values of images for it."""

    model: PreTrainedModel
    image_processor: Any


def load_vision(name: str) -> VisionEncoder:
    """The encoder called ``name``; of a model of images and texts (CLIP, SigLIP), the half that sees images.

    Raises:
        ValueError: there is no such encoder, it is incomplete, or it is no vision transformer.
        ArtifactError: it is a URL, and there is no such folder, or it is damaged.
    """
    source = artifacts.model_source(name)
    try:
        model, report = AutoModel.from_pretrained(source, output_loading_info=True, use_safetensors=True)
        image_processor = AutoImageProcessor.from_pretrained(source)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"--vision {name} cannot be loaded: {error}\nAn encoder is {_NAMES}") from error
    missing = sorted(key for key in report["missing_keys"] if "pooler." not in key)
    model = getattr(model, "vision_model", model)
    if missing:
        raise ValueError(f"--vision {name} lacks {len(missing)} weights, such as {missing[0]}: it is incomplete")
    if not hasattr(model.config, "patch_size") or not hasattr(model.config, "image_size"):
        raise ValueError(f"--vision {name} is a {model.config.model_type}, not a vision transformer; name {_NAMES}")
    return VisionEncoder(model.eval(), image_processor)
