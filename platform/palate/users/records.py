"""What the store holds about people, as values."""

import base64
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import AwareDatetime, Base64Bytes, BaseModel, ConfigDict, ValidationError

from palate.users.checks import require_id, require_text


@dataclass(frozen=True)
class PastText:
    """A text that a person wrote: to what, and when (any notation)."""

    input: str
    output: str
    date: str | None = None


@dataclass(frozen=True)
class Person:
    """A person and the history, oldest text first as given. ``version`` is the history's."""

    tenant: str
    user_id: str
    version: int
    texts: tuple[PastText, ...]
    created: datetime
    updated: datetime


@dataclass(frozen=True, eq=False)
class Fitted:
    """A person's vector for one model head.

    ``version``: of the history that it was fitted to; ``texts``: how many of its texts the fit used;
    ``vector_J``: (J,) float32.
    """

    head: str
    version: int
    cluster: int
    vector_J: NDArray[np.float32]
    texts: int


@dataclass(frozen=True)
class Feedback:
    """What a person made of an answer."""

    id: int
    prompt: str
    answer: str
    edited: str
    created: datetime


def require_past_text(one: PastText, what: str) -> None:
    """Raises ValueError unless each field of a text can be stored, naming it."""
    require_text(one.input, f"{what}.input")
    require_text(one.output, f"{what}.output")
    if one.date is not None:
        require_text(one.date, f"{what}.date")


def require_vector(fitted: Fitted) -> None:
    """Raises ValueError unless the vector is (J,) finite floating-point numbers."""
    vector_J = np.asarray(fitted.vector_J)
    found = f"{vector_J.dtype} of shape {vector_J.shape}"
    if vector_J.ndim == 1 and vector_J.dtype.kind == "f":
        if np.isfinite(vector_J).all():
            return
        found += " with numbers that are not finite"
    raise ValueError(f"the vector for head {fitted.head!r} is {found}; expected (J,) finite numbers, float32")


class _Values(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Text(_Values):
    input: str
    output: str
    date: str | None


class _Feedback(_Values):
    prompt: str
    answer: str
    edited: str
    created: AwareDatetime


class _Vector(_Values):
    head: str
    version: int
    cluster: int
    texts: int
    vector: Base64Bytes  # of little-endian float32


class _Exported(_Values):
    format: Literal[1]
    user_id: str
    version: int
    created: AwareDatetime
    updated: AwareDatetime
    texts: list[_Text]
    feedback: list[_Feedback]
    vectors: list[_Vector]


def to_json(person: Person, feedback: list[Feedback], fits: list[Fitted]) -> dict[str, Any]:
    """A person with all that belongs to them as JSON values. The tenant is left out: ``from_json`` is told it."""
    return {
        "format": 1,
        "user_id": person.user_id,
        "version": person.version,
        "created": person.created.isoformat(),
        "updated": person.updated.isoformat(),
        "texts": [asdict(one) for one in person.texts],
        "feedback": [
            {"prompt": one.prompt, "answer": one.answer, "edited": one.edited, "created": one.created.isoformat()}
            for one in feedback
        ],
        "vectors": [
            {
                "head": one.head,
                "version": one.version,
                "cluster": one.cluster,
                "texts": one.texts,
                "vector": base64.b64encode(one.vector_J.astype("<f4").tobytes()).decode(),
            }
            for one in fits
        ],
    }


def from_json(tenant: str, values: Mapping[str, Any]) -> tuple[Person, list[Feedback], list[Fitted]]:
    """What ``to_json`` was given; the feedback has no ids of its own yet (0).

    Raises:
        ValueError: something is not as ``to_json`` writes it, by name.
    """
    try:
        # By way of JSON, where a strict model takes times and bytes from strings.
        read = _Exported.model_validate_json(json.dumps(values))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise ValueError(f"an exported person cannot be read: {place}: {first['msg']}") from None
    texts = tuple(PastText(one.input, one.output, one.date) for one in read.texts)
    person = Person(tenant, require_id(read.user_id, "user_id"), read.version, texts, read.created, read.updated)
    for number, text in enumerate(texts):
        require_past_text(text, f"texts[{number}]")
    feedback = [Feedback(0, one.prompt, one.answer, one.edited, one.created) for one in read.feedback]
    for number, note in enumerate(feedback):
        for name in ("prompt", "answer", "edited"):
            require_text(getattr(note, name), f"feedback[{number}].{name}")
    fits = []
    for number, one in enumerate(read.vectors):
        if len(one.vector) % 4 or one.version > read.version:
            raise ValueError(
                f"an exported person cannot be read: vectors[{number}] has {len(one.vector)} bytes for version "
                f"{one.version}; expected float32 for a version up to the history's, {read.version}"
            )
        fits.append(Fitted(one.head, one.version, one.cluster, np.frombuffer(one.vector, dtype="<f4"), one.texts))
        require_vector(fits[-1])
    return person, feedback, fits
