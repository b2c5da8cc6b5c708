"""What the configuration of a text server may say. Imports no torch: who deploys a server reads this, and no model."""

from typing import Literal

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, model_validator

from palate.users.checks import require_id


class Settings(BaseModel):
    """How a replica serves. The defaults are for a laptop."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    database: str = "sqlite:///palate.db"
    """URL of the user store: a SQLite file, or PostgreSQL where there are several replicas."""
    device: str = "cpu"
    precision: Literal["fp32", "bf16"] = "fp32"
    threads: int | None = Field(None, ge=1)
    """Threads of torch; all cores by default."""
    require_keys: bool = True
    """Whether every request needs an API key; without, everybody is the tenant "default"."""
    alias: str = Field("palate", min_length=1, max_length=128)
    """The name of whatever run is live, for clients that do not want to know its name."""
    unified: dict[str, str] = Field(default_factory=dict)
    """Models that read images, by the names that clients use: folders or URLs of runs of jobs/unihetero.py."""
    slots: int = Field(16, ge=1)
    """Answers that are decoded at a time."""
    max_length: int = Field(2048, ge=16)
    """Most tokens of a prompt and its answer together."""
    prefill_tokens: int = Field(256, ge=16)
    """Prompt tokens in one pass: how long a new prompt may hold up running answers."""
    gather_steps: int = Field(4, ge=0)
    """Tokens of running answers that a new prompt may wait for others to share its pass; 0 prefills at once."""
    max_waiting: int = Field(64, ge=0)
    """Requests that may wait for a slot; more are refused with 503."""
    max_in_flight: int = Field(32, ge=1)
    """Requests that one key may have under way in this replica, whose n answers count each; more are refused with
    429 before their body is read."""
    max_answers: int = Field(8, ge=1)
    """Largest ``n``."""
    max_new_tokens: int = Field(512, ge=1)
    """Longest answer; also the length where a request names none."""
    max_body_bytes: int = Field(4_000_000, ge=1000)
    max_images: int = Field(4, ge=1)
    """Images of one request."""
    max_image_bytes: int = Field(2_500_000, ge=1)
    """Of the file of an image in a request; it must fit into ``max_body_bytes``, where base64 takes a third more."""
    max_image_pixels: int = Field(16_000_000, ge=1, le=Image.MAX_IMAGE_PIXELS or 2**31)
    """Of an image in a request, before it is unpacked."""
    cache_bytes: int = Field(64_000_000, ge=0)
    """Vectors kept in memory."""

    @model_validator(mode="after")
    def _names(self) -> "Settings":
        for name in self.unified:
            if require_id(name, "the name of a unified model") == self.alias:
                raise ValueError(f"a unified model is named {name!r}, which is the alias of the live run: rename one")
        return self
