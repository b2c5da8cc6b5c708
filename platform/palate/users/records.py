"""What the store holds about people, as values."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
)

from palate.users.checks import MOST_TEXTS, require_id, require_text


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


@dataclass(frozen=True)
class Known:
    """A person without the history, of which ``count`` is the number of texts. ``version`` is the history's."""

    tenant: str
    user_id: str
    version: int
    count: int
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


@dataclass(frozen=True)
class Ranking:
    """Images in the order in which a person likes them, best first, by their digests (``palate.users.images``).

    ``id`` is unique in the tenant; ``number`` counts all rankings of a database, 0 before it is stored.
    """

    user_id: str
    id: str
    prompt: str
    images: tuple[str, ...]
    model: str | None = None
    created: datetime = datetime(1970, 1, 1, tzinfo=UTC)
    number: int = 0

    @property
    def content(self) -> tuple[Any, ...]:
        """What a person said, whenever it was stored."""
        return self.user_id, self.id, self.prompt, self.images, self.model


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
        with np.errstate(over="ignore"):
            if np.isfinite(vector_J.astype(np.float32)).all():  # as it is stored
                return
        found += " with numbers that are not finite"
    raise ValueError(f"the vector for head {fitted.head!r} is {found}; expected (J,) finite numbers, float32")


def _storable(value: str) -> str:
    return require_text(value, "it")


def _from_iso(value: object) -> object:
    # Pydantic would take numbers for times too.
    return datetime.fromisoformat(value) if isinstance(value, str) else value


def _ordinary(value: datetime) -> datetime:
    # Compared, not converted: what is next to the first or last year that there is has no equal in UTC.
    if not datetime(1970, 1, 1, tzinfo=UTC) <= value < datetime(2201, 1, 1, tzinfo=UTC):
        raise ValueError(f"{value.isoformat()} is not in the years 1970 to 2200 of UTC")
    return value


def _id(value: str) -> str:
    return require_id(value, "it")


def _floats(value: str) -> str:
    content = base64.b64decode(value, validate=True)
    if not 4 <= len(content) <= 4 * MOST_NUMBERS or len(content) % 4:
        raise ValueError(f"{len(content)} bytes are not 1 to {MOST_NUMBERS} numbers of float32")
    if not np.isfinite(np.frombuffer(content, dtype="<f4")).all():
        raise ValueError("it holds numbers that are not finite")
    return value


def _one_a_head(values: list["_Vector"]) -> list["_Vector"]:
    heads = [one.head for one in values]
    if twice := next((head for head in heads if heads.count(head) > 1), None):
        raise ValueError(f"head {twice!r} has more than one vector")
    return values


LONGEST = 100_000  # characters of a text
MOST_NUMBERS = 8192  # in a vector
MOST_RANKED = 8  # images of a ranking
# The patterns say in the OpenAPI document what the validators check with a better message.
_STORABLE = {"pattern": r"^[^\u0000]*$"}
_Any = Annotated[str, Field(max_length=LONGEST, json_schema_extra=_STORABLE), AfterValidator(_storable)]
_Written = Annotated[
    str, Field(min_length=1, max_length=LONGEST, json_schema_extra=_STORABLE), AfterValidator(_storable)
]
_Date = Annotated[str, Field(max_length=40, json_schema_extra=_STORABLE), AfterValidator(_storable)]
_Time = Annotated[
    AwareDatetime,
    Field(description="In ISO 8601 with its offset, in the years 1970 to 2200 of UTC."),
    BeforeValidator(_from_iso),
    AfterValidator(_ordinary),
]
_ID = Annotated[
    str,
    Field(min_length=1, max_length=128, json_schema_extra={"pattern": "^[A-Za-z0-9._:@-]+$"}),
    AfterValidator(_id),
]
_Version = Annotated[int, Field(ge=1, le=2**53)]
_Count = Annotated[int, Field(ge=0, le=2**31 - 1)]
_Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
_Floats = Annotated[
    str,
    Field(
        min_length=8,
        max_length=(4 * MOST_NUMBERS + 2) // 3 * 4,
        description="Base64 of finite little-endian float32.",
        json_schema_extra={"pattern": "^[A-Za-z0-9+/]+={0,2}$"},
    ),
    AfterValidator(_floats),
]


class _Values(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Text(_Values):
    input: _Any
    output: _Written
    date: _Date | None = None


class _Feedback(_Values):
    prompt: _Any
    answer: _Any
    edited: _Written
    created: _Time


class _Ranking(_Values):
    id: _ID
    prompt: _Any
    model: _ID | None
    created: _Time
    images: Annotated[list[_Digest], Field(min_length=2, max_length=MOST_RANKED)]


class _Vector(_Values):
    head: _ID
    version: _Version
    cluster: _Count
    texts: _Count
    vector: _Floats


class ExportedPerson(_Values):
    """What ``Store.export`` gives, and all that ``Store.restore`` takes."""

    format: Annotated[int, Field(strict=True, ge=1, le=1)]  # a literal would take true for 1
    user_id: _ID
    version: _Version
    created: _Time
    updated: _Time
    texts: Annotated[list[_Text], Field(max_length=MOST_TEXTS)]  # none, where only rankings are known
    feedback: Annotated[list[_Feedback], Field(max_length=MOST_TEXTS)]
    vectors: Annotated[list[_Vector], Field(max_length=16), AfterValidator(_one_a_head)]
    rankings: Annotated[list[_Ranking], Field(max_length=MOST_TEXTS)] = []


def to_json(
    person: Person, feedback: list[Feedback], fits: list[Fitted], rankings: Sequence[Ranking] = ()
) -> dict[str, Any]:
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
        "rankings": [
            {
                "id": one.id,
                "prompt": one.prompt,
                "model": one.model,
                "created": one.created.isoformat(),
                "images": list(one.images),
            }
            for one in rankings
        ],
    }


def from_json(tenant: str, values: ExportedPerson | Mapping[str, Any]) -> tuple[Person, list[Feedback]]:
    """The person and the feedback of an export; the feedback has no ids of its own yet (0).

    Its vectors are left out: they may belong to another head, or to nobody, and are fitted anew soon. So are its
    rankings, whose images are not in it.

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
    person = Person(tenant, read.user_id, read.version, texts, read.created, read.updated)
    return person, [Feedback(0, one.prompt, one.answer, one.edited, one.created) for one in read.feedback]
