"""One typed configuration per job: frozen dataclasses, parsed by tyro, written into the artifact.

Every field is identity (it decides what is computed, the default) or scale (workers, devices, micro-batches, storage,
logging). Only identity fields decide whether a finished artifact can be used again.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

import pydantic
import tyro

T = TypeVar("T")


def scale(default: Any = dataclasses.MISSING, **keywords: Any) -> Any:
    """A dataclass field that changes where or how fast, never what is computed."""
    return dataclasses.field(default=default, metadata={"role": "scale"}, **keywords)


def parse(config_type: Any, description: str | None = None, arguments: Sequence[str] | None = None) -> Any:
    """The config that the command line states; unknown or ill-typed flags end the program with help."""
    return tyro.cli(config_type, description=description, args=arguments, config=(tyro.conf.OmitArgPrefixes,))


def to_dict(config: Any) -> dict[str, Any]:
    """All fields, as JSON values. A plain mapping passes through."""
    if not dataclasses.is_dataclass(config):
        return dict(config)
    return pydantic.TypeAdapter(type(config)).dump_python(config, mode="json")


def identity(config: Any) -> dict[str, Any]:
    """The identity fields only, nested configs included, as JSON values."""
    if not dataclasses.is_dataclass(config):
        return dict(config)
    values = to_dict(config)
    for field in dataclasses.fields(config):
        if field.metadata.get("role") == "scale":
            del values[field.name]
        elif dataclasses.is_dataclass(nested := getattr(config, field.name)):
            values[field.name] = identity(nested)
    return values


def from_dict(config_type: type[T], values: dict[str, Any]) -> T:
    """The config that ``to_dict`` wrote.

    Raises:
        ValueError: a field is unknown or has another type; the message names it.
    """
    known = {field.name for field in dataclasses.fields(config_type)}  # type: ignore[arg-type]
    if unknown := sorted(values.keys() - known):
        raise ValueError(f"{config_type.__name__} has no field {unknown[0]!r}; it has {sorted(known)}")
    return pydantic.TypeAdapter(config_type).validate_python(values)
