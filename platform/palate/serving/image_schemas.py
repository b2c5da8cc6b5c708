"""Requests for images in OpenAI's shapes: their fields, forms with files, and uploaded images.

Every field that OpenAI documents is implemented or refused with an error that names it; none is ignored. A field that
is null counts as absent, and one that asks for nothing (no compression, no partial images) is accepted.
"""

import io
import json
import math
import re
from collections.abc import Mapping
from email.message import Message
from email.parser import BytesHeaderParser
from email.utils import collapse_rfc2231_value
from typing import Annotated, Any, ClassVar, Literal

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, model_validator

from palate.corpora.pictures import as_seen
from palate.serving.schemas import MAX_SEED, Number, Text
from palate.users.records import MOST_RANKED

MOST_HEADER_BYTES = 2048  # of a part of a form
MOST_PARTS = 64  # of a form
_PLAIN = re.compile(r"true|false|-?(0|[1-9][0-9]{0,29})(\.[0-9]{1,30})?([eE][+-]?[0-9]{1,2})?")  # as JSON writes them
FORMATS = ("PNG", "JPEG", "WEBP")

Nothing = Annotated[StrictInt, Field(ge=0, le=0)]
Everything = Annotated[StrictInt, Field(ge=100, le=100)]


class _ImageBody(BaseModel):
    """What both kinds of requests share; ``seed``, ``steps`` and ``guidance`` are Palate's own."""

    model_config = ConfigDict(extra="forbid")

    prompt: Annotated[Text, Field(min_length=1, max_length=32_000)]
    model: StrictStr | None = None
    n: Annotated[StrictInt, Field(ge=1)] = 1
    size: Annotated[StrictStr, Field(pattern=r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$")] = "auto"
    user: StrictStr | None = None
    stream: StrictBool = False
    seed: Annotated[StrictInt, Field(ge=-MAX_SEED - 1, le=MAX_SEED)] | None = None
    steps: Annotated[StrictInt, Field(ge=1)] | None = None
    guidance: Annotated[Number, Field(ge=0, le=100)] | None = None
    # Only what asks for nothing else than is done anyway.
    response_format: Literal["b64_json"] = "b64_json"
    output_format: Literal["png"] = "png"
    output_compression: Everything = 100
    background: Literal["auto", "opaque"] = "auto"
    quality: Literal["auto"] = "auto"
    partial_images: Nothing = 0

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value is not None}

    @property
    def wanted(self) -> tuple[int, int] | None:
        """(width, height), or None for whatever suits the model."""
        if self.size == "auto":
            return None
        width, _, height = self.size.partition("x")
        return int(width), int(height)


class GenerationRequest(_ImageBody):
    """``POST /v1/images/generations``."""

    moderation: Literal["auto"] = "auto"


class EditRequest(_ImageBody):
    """The fields of ``POST /v1/images/edits``, beside the file ``image``."""

    input_fidelity: Literal["low"] = "low"
    image_guidance: Annotated[Number, Field(ge=1, le=100)] | None = None

    _texts: ClassVar[tuple[str, ...]] = ("prompt", "model", "user")  # which may look like numbers

    @classmethod
    def of_form(cls, fields: Mapping[str, str]) -> "EditRequest":
        """The request of a form, where numbers and booleans are texts.

        Raises:
            ValidationError: as of a JSON body.
        """
        return cls.model_validate(
            {
                name: json.loads(value) if name not in cls._texts and _PLAIN.fullmatch(value) else value
                for name, value in fields.items()
            }
        )


class RankedImage(BaseModel):
    """One image of a ranking, as answers hold it."""

    model_config = ConfigDict(extra="forbid")

    b64_json: Annotated[StrictStr, Field(min_length=1)]


class RankingRequest(BaseModel):
    """``POST /v1/feedback``: images in the order in which a person likes them, best first."""

    model_config = ConfigDict(extra="forbid")

    user: StrictStr
    prompt: Annotated[Text, Field(min_length=1, max_length=32_000, pattern=r"\S")]
    images: Annotated[list[RankedImage], Field(min_length=2, max_length=MOST_RANKED)]
    model: StrictStr | None = None
    id: StrictStr | None = None


class FormError(ValueError):
    """A form that is none, or a file that is not as it should be; ``param`` names the field, if any."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


def read_form(content_type: str, body: bytes) -> tuple[dict[str, str], dict[str, list[bytes]]]:
    """Fields by name, and the files of each name, of a ``multipart/form-data`` body (RFC 7578).

    Raises:
        FormError: it is something else, cut off, has more than ``MOST_PARTS`` parts, headers that are too long, or a
            field twice.
    """
    head = Message()
    head["Content-Type"] = content_type
    boundary = head.get_boundary()
    if head.get_content_type() != "multipart/form-data" or not boundary:
        raise FormError(f"the body must be multipart/form-data with a boundary, found {content_type[:100]!r}")
    delimiter = b"\r\n--" + boundary.encode("latin-1", "replace")
    parts = (b"\r\n" + body).split(delimiter, MOST_PARTS + 1)[1:]  # without what comes before the first
    if not parts or not parts.pop().startswith(b"--"):
        raise FormError(f"the form is cut off, or has more than {MOST_PARTS} parts")
    fields: dict[str, str] = {}
    files: dict[str, list[bytes]] = {}
    for part in parts:
        lines, found, content = part.partition(b"\r\n\r\n")
        if len(lines) > MOST_HEADER_BYTES:  # the parser's time grows with their square
            raise FormError(f"the headers of a part of the form have more than {MOST_HEADER_BYTES} bytes")
        described = BytesHeaderParser().parsebytes(lines.strip() + b"\r\n\r\n")
        name = described.get_param("name", header="Content-Disposition")
        if not found or not name:
            raise FormError("a part of the form has no name")
        key = collapse_rfc2231_value(name)
        if described.get_filename() is not None:
            files.setdefault(key, []).append(content)
        elif key in fields:
            raise FormError(f"the field {key[:100]!r} is given twice", key[:100])
        else:
            fields[key] = _text(key, content)
    return fields, files


def one_image(fields: Mapping[str, str], files: Mapping[str, list[bytes]]) -> bytes:
    """The file of the field ``image``, as clients send one or a list of one.

    Raises:
        FormError: there is none, there are several, or a file of another name, such as a mask.
    """
    for name in files:
        if name not in ("image", "image[]"):
            raise FormError(f"a file {name[:100]!r} is not supported by this server: leave it out", name[:100])
    found = [*files.get("image", ()), *files.get("image[]", ())]
    if len(found) != 1:
        what = "it is sent as text" if "image" in fields else f"found {len(found)}"
        raise FormError(f"'image' must be one file, {what}", "image")
    return found[0]


def read_upload(content: bytes, most_pixels: int) -> Image.Image:
    """The image in a PNG, JPEG or WebP file, upright, in RGB, over white where it is transparent.

    Its size is read before its pixels are, so a small file that unpacks into a huge image takes no memory.

    Raises:
        FormError: it is none of these, damaged, or has more pixels than ``most_pixels``.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
            width, height = opened.size
            if width * height > most_pixels:
                raise FormError(
                    f"the image has {width}x{height} pixels: at most {most_pixels} pixels are read", "image"
                )
            return as_seen(opened)
    except FormError:
        raise
    except Exception as error:  # decoders raise all kinds of it on damaged files
        raise FormError(f"'image' is no {', '.join(FORMATS)} that can be read: {str(error)[:200]}", "image") from error


def fitted_size(size: tuple[int, int], multiple: int, most_pixels: int) -> tuple[int, int]:
    """The largest size up to ``size`` of about its proportions that has sides of ``multiple`` and so many pixels."""
    scale = min(1.0, math.sqrt(most_pixels / (size[0] * size[1])))
    width, height = (max(multiple, int(side * scale) // multiple * multiple) for side in size)
    # A strip whose short side had to grow.
    longest = max(multiple, most_pixels // min(width, height) // multiple * multiple)
    return min(width, longest), min(height, longest)


def _text(name: str, content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise FormError(f"{name[:100]!r} is no UTF-8", name[:100]) from error
