"""What the store holds about people, as values."""

import base64
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import (
    AfterValidator,
    AwareDatetime,
    Base64Bytes,
    BaseModel,
    ConfigDict,
    Field,
    StrictInt,
    StrictStr,
    ValidationError,
)

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


def _storable(value: str) -> str:
    return require_text(value, "it")


def _ordinary(value: datetime) -> datetime:
    if not 1970 <= value.year <= 2200:
        raise ValueError(f"the year {value.year} is not between 1970 and 2200")
    return value


def _floats(value: bytes) -> bytes:
    if not 4 <= len(value) <= 4 * 8192 or len(value) % 4:
        raise ValueError(f"{len(value)} bytes are not 1 to 8192 numbers of float32")
    return value


LONGEST = 100_000  # characters of a text
_Any = Annotated[StrictStr, Field(max_length=LONGEST), AfterValidator(_storable)]
_Written = Annotated[StrictStr, Field(min_length=1, max_length=LONGEST), AfterValidator(_storable)]
_Date = Annotated[StrictStr, Field(max_length=40), AfterValidator(_storable)]
_Time = Annotated[AwareDatetime, AfterValidator(_ordinary)]
_Count = Annotated[StrictInt, Field(ge=0, le=2**31 - 1)]


class _Values(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Text(_Values):
    input: _Any
    output: _Written
    date: _Date | None = None


class _Feedback(_Values):
    prompt: _Any
    answer: _Any
    edited: _Written
    created: _Time


class _Vector(_Values):
    head: Annotated[StrictStr, Field(max_length=128)]
    version: Annotated[StrictInt, Field(ge=0, le=2**53)]
    cluster: _Count
    texts: _Count
    vector: Annotated[Base64Bytes, AfterValidator(_floats)]  # of little-endian float32


class ExportedPerson(_Values):
    """What ``Store.export`` gives, and all that ``Store.restore`` takes."""

    format: Literal[1]
    user_id: StrictStr
    version: Annotated[StrictInt, Field(ge=0, le=2**53)]
    created: _Time
    updated: _Time
    texts: Annotated[list[_Text], Field(max_length=10_000)]
    feedback: Annotated[list[_Feedback], Field(max_length=10_000)]
    vectors: Annotated[list[_Vector], Field(max_length=16)]


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


def from_json(tenant: str, values: "ExportedPerson | Mapping[str, Any]") -> tuple[Person, list[Feedback]]:
    """The person and the feedback of an export; the feedback has no ids of its own yet (0).

    Its vectors are left out: they may belong to another head, or to nobody, and are fitted anew soon.

    Raises:
        ValueError: something is not as ``to_json`` writes it, by name.
    """
    if isinstance(values, ExportedPerson):
        read = values
    else:
        try:
            read = ExportedPerson.model_validate(dict(values))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(str(part) for part in first["loc"]) or "the whole"
            raise ValueError(f"an exported person cannot be read: {place}: {first['msg']}") from None
    texts = tuple(PastText(one.input, one.output, one.date) for one in read.texts)
    person = Person(tenant, require_id(read.user_id, "user_id"), read.version, texts, read.created, read.updated)
    return person, [Feedback(0, one.prompt, one.answer, one.edited, one.created) for one in read.feedback]
