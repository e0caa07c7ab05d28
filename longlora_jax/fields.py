"""The fields of dataclasses by the types that they declare: values held against them, and read back from JSON."""

import dataclasses
import types
import typing
from collections.abc import Iterator
from typing import Any

from longlora_jax.errors import UserError


def type_faults(value: Any, before: str = "") -> Iterator[str]:
    """What in a dataclass and those in it is not of its field's type, a line each; an int is a float as well."""
    hints = typing.get_type_hints(type(value))
    for field in dataclasses.fields(value):
        inner, name, hint = getattr(value, field.name), f"{before}{field.name}", hints[field.name]
        if dataclasses.is_dataclass(inner) and type(inner) in (hint, *typing.get_args(hint)):
            yield from type_faults(inner, f"{name}.")
        elif not _fits(inner, hint):
            yield f"{name}={inner!r} is of type {type(inner).__name__}, it must be {_named(hint)}"


def _named(hint: Any) -> str:
    """A type in the words of a config: str, a tuple of str, ModelConfig | None."""
    if isinstance(hint, types.UnionType):
        return " | ".join(map(_named, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        inner = _named(typing.get_args(hint)[0])
        return f"a tuple of {inner}" + (", as in ('a',)" if inner == "str" else "")
    return "None" if hint is type(None) else hint.__name__


def _fits(value: Any, hint: Any) -> bool:
    if isinstance(hint, types.UnionType):
        return any(_fits(value, one) for one in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_fits(x, typing.get_args(hint)[0]) for x in value)
    if hint in (int, float):  # True is an int for Python alone
        return isinstance(value, int | hint) and not isinstance(value, bool)
    return isinstance(value, hint)


def from_dict(kind, values: dict):
    """The inverse of dataclasses.asdict: a config of dataclass `kind` out of nested dicts (as JSON gives them)."""
    hints = typing.get_type_hints(kind)
    if not isinstance(values, dict):
        raise UserError(f"{kind.__name__} is {str(values)[:50]!r} here: it is an object of fields")
    if unknown := set(values) - set(hints):
        raise UserError(f"{kind.__name__} has no field {', '.join(sorted(unknown))}")

    def restore(hint, value):
        if isinstance(hint, types.UnionType):
            hint = next(h for h in typing.get_args(hint) if h is not type(None))
        if dataclasses.is_dataclass(hint) and value is not None:
            return from_dict(hint, value)
        if not isinstance(value, list):
            return value
        inner = next(iter(typing.get_args(hint)), None)
        return tuple(from_dict(inner, item) if dataclasses.is_dataclass(inner) else item for item in value)

    return kind(**{name: restore(hints[name], value) for name, value in values.items()})


def flat(config: dict[str, Any], before: str = "") -> dict[str, Any]:
    """A nested config as {"optim.learning_rate": value}."""
    found = {}
    for key, value in config.items():
        name = f"{before}{key}"
        found |= flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return found
