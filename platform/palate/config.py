"""One typed configuration per job: frozen dataclasses, parsed by tyro, written into the artifact.

Every field is identity (it decides what is computed, the default) or scale (workers, devices, micro-batches, storage,
logging). Only identity fields decide whether a finished artifact can be used again.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import fsspec
import pydantic
import tyro

T = TypeVar("T")


def scale(default: Any = dataclasses.MISSING, **keywords: Any) -> Any:
    """A dataclass field that changes where or how fast, never what is computed."""
    return dataclasses.field(default=default, metadata={"role": "scale"}, **keywords)


def parse(config_type: Any, description: str | None = None, arguments: Sequence[str] | None = None) -> Any:
    """The config that the command line states; unknown or ill-typed flags end the program with help, and so do values
    that the config itself refuses (``require``).

    ``--config FILE`` first: the values that ``to_dict`` wrote there, of which further flags override some.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    known: dict[str, Any] = {}
    if isinstance(config_type, type) and dataclasses.is_dataclass(config_type):
        hint = "--config FILE, first: values as a sweep wrote them; flags override these."
        description = f"{(description or '').rstrip()}\n\n{hint}"
        if given[:1] == ["--config"]:
            known["default"] = read(config_type, given[1] if len(given) > 1 else "")
            given = given[2:]
    return tyro.cli(config_type, description=description, args=given, config=(tyro.conf.OmitArgPrefixes,), **known)


def parse_command(commands: Mapping[str, Any], description: str | None = None) -> Any:
    """As ``parse``, for a script with subcommands: the config of the one that is named."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in commands and sys.argv[2:3] == ["--config"]:
        return parse(commands[name], description, sys.argv[2:])
    return tyro.extras.subcommand_cli_from_dict(
        dict(commands), description=description, config=(tyro.conf.OmitArgPrefixes,)
    )


def read(config_type: type[T], path: str) -> T:
    """The config in a JSON file, at a path or URL, that ``to_dict`` wrote.

    Raises:
        SystemExit: there is no such file, or it holds something else; the message says what.
    """
    try:
        with fsspec.open(path, encoding="utf-8", mode="rt") as file:
            return from_dict(config_type, json.load(file))
    except (OSError, ValueError) as error:
        raise SystemExit(f"--config {path}: {error}") from None


def require(config: Any, valid: Callable[[Any], bool], expected: str, *names: str) -> None:
    """Refuse a config one of whose fields ``names`` is not ``valid``; for ``__post_init__``.

    Raises:
        ValueError: naming the flag, what was ``expected`` and the value.
    """
    for name in names:
        if not valid(value := getattr(config, name)):
            raise ValueError(f"--{name.replace('_', '-')} is {expected}, got {value}")


def require_at_least(config: Any, least: float, *names: str) -> None:
    """``require`` numbers of at least ``least``."""
    require(config, lambda value: value >= least, f"at least {least:g}", *names)


def require_shares(config: Any, *names: str) -> None:
    """``require`` numbers from 0 to 1."""
    require(config, lambda value: 0 <= value <= 1, "a share from 0 to 1", *names)


def to_dict(config: Any) -> dict[str, Any]:
    """All fields, as JSON values. A plain mapping passes through."""
    if not dataclasses.is_dataclass(config):
        return dict(config)
    return _adapter(type(config)).dump_python(config, mode="json")


def identity(config: Any) -> dict[str, Any]:
    """The identity fields only, those of nested configs included, as JSON values."""
    values = to_dict(config)
    return _without_scale(config, values) if dataclasses.is_dataclass(config) else values


def from_dict(config_type: type[T], values: dict[str, Any]) -> T:
    """The config that ``to_dict`` wrote.

    Raises:
        ValueError: a field is unknown or has another type; the message names it.
    """
    # JSON's strictness, so that 1.5 or "3" is no integer but a list is a tuple.
    config = _adapter(config_type).validate_json(json.dumps(values), strict=True)
    for name, known in _unknown(values, to_dict(config)):
        raise ValueError(f"{config_type.__name__} has no field {name!r}; it has {known}")
    return config


def _adapter(config_type: Any) -> pydantic.TypeAdapter[Any]:
    return pydantic.TypeAdapter(config_type)


def _without_scale(value: Any, dumped: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {
            field.name: _without_scale(getattr(value, field.name), dumped[field.name])
            for field in dataclasses.fields(value)
            if field.metadata.get("role") != "scale"
        }
    if isinstance(value, list | tuple):
        return [_without_scale(*pair) for pair in zip(value, dumped, strict=True)]
    if isinstance(value, Mapping):
        return {key: _without_scale(*pair) for key, *pair in zip(dumped, value.values(), dumped.values(), strict=True)}
    if isinstance(value, set | frozenset):
        return sorted(dumped, key=json.dumps)  # their order differs from process to process
    return dumped


def _unknown(given: Any, kept: Any, path: str = "") -> Iterator[tuple[str, list[str]]]:
    """Dotted names in ``given`` that the config does not have, each with those that it has there."""
    if isinstance(given, dict) and isinstance(kept, dict):
        for name, value in given.items():
            if name not in kept:
                yield f"{path}{name}", sorted(kept)
            else:
                yield from _unknown(value, kept[name], f"{path}{name}.")
    elif isinstance(given, list) and isinstance(kept, list):
        for pair in zip(given, kept, strict=True):
            yield from _unknown(*pair, path)
