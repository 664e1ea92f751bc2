"""Settings: frozen dataclasses, read from TOML, overridden on the command line by dotted names, saved resolved.

A recipe declares its settings as a frozen dataclass, with nested dataclasses for groups, and calls `parse`. This module checks
names and types; each class checks its ranges in `__post_init__`. A wrong file is refused before any work starts.

The reader is our own: msgspec and cattrs name neither the wrong value nor the nearest known key, and cannot build the
incomplete draft that command-line overrides complete.
"""

import dataclasses
import difflib
import sys
import tomllib
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

Settings = TypeVar("Settings")


def parse(settings_class: type[Settings], argv: Sequence[str] | None = None, *, prog: str | None = None) -> Settings:
    """Read settings from an optional TOML file (the first argument, unless it is an option) and dotted overrides.

    `python -m recipes.sft recipes/tiny/sft1.toml --steps 10 --schedule.peak 1e-4` is
    `parse(SftSettings, ["recipes/tiny/sft1.toml", "--steps", "10", ...])`. Overrides may add keys that the file lacks; ranges
    are checked after them.

    Raises: SystemExit. A mistake in the file ends the program with one line on standard error and status 1; a mistake on the
        command line ends it with tyro's message and status 2.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if not arguments or arguments[0].startswith("-"):
            default = _draft(settings_class, {})
        elif len(arguments) == 1:
            return read_toml(settings_class, arguments[0])
        else:
            path = Path(arguments.pop(0))
            default = _in_file(path, _draft, settings_class, read_table(path))
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from None
    import tyro  # here, as only a command line with options needs it

    return tyro.cli(settings_class, args=arguments, prog=prog, default=default)


def read_toml(settings_class: type[Settings], path: str | Path) -> Settings:
    """Settings from a TOML file.

    Raises: FileNotFoundError; ValueError naming the file and the key for broken TOML, an unknown key (with the nearest known
        one), a wrong type or a value out of range.
    """
    path = Path(path)
    return _in_file(path, from_table, settings_class, read_table(path))


def read_table(path: Path) -> dict[str, Any]:
    """The content of a TOML file. Raises: FileNotFoundError, ValueError naming the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such configuration file")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid TOML: {error}") from None


def _in_file(path: Path, build: Callable[..., Settings], settings_class: type[Settings], table: dict[str, Any]) -> Settings:
    try:
        return build(settings_class, table)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def from_table(settings_class: type[Settings], table: dict[str, Any], prefix: str = "") -> Settings:
    """Build a (nested) dataclass from a TOML table.

    Raises: ValueError naming an unknown or missing key, or a value of the wrong type, by its dotted name.
    """
    values = _values(settings_class, table, prefix)
    missing = [name for name in _required(settings_class) if name not in values]
    if missing:
        raise ValueError(f"missing key '{prefix}{missing[0]}'")
    return settings_class(**values)


def _draft(settings_class: type[Settings], table: dict[str, Any]) -> Settings:
    """The object that tyro's overrides change: the table's values, unchecked and perhaps incomplete."""
    import tyro

    values = _values(settings_class, table, "")
    hints = typing.get_type_hints(settings_class)
    for name in _required(settings_class):
        # A command line cannot give a list of tables; tyro would refuse even to show the help if one was missing.
        tables = typing.get_origin(hints[name]) is tuple and dataclasses.is_dataclass(typing.get_args(hints[name])[0])
        values.setdefault(name, () if tables else tyro.MISSING)
    draft = object.__new__(settings_class)
    for field in dataclasses.fields(settings_class):  # type: ignore[arg-type]
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        object.__setattr__(draft, field.name, values.get(field.name, default))
    return draft


def _required(settings_class: type) -> list[str]:
    return [
        field.name
        for field in dataclasses.fields(settings_class)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]


def _values(settings_class: type, table: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The table's values by field name, each of its field's type."""
    hints = typing.get_type_hints(settings_class)
    fields = {field.name for field in dataclasses.fields(settings_class)}
    values = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in fields:
            nearest = difflib.get_close_matches(name, fields, n=1, cutoff=0.0)
            raise ValueError(f"unknown key '{prefix}{key}'; the nearest known one is '{prefix}{nearest[0]}'")
        if name in values:
            raise ValueError(f"'{prefix}{name}' is given twice, spelled with - and with _")
        values[name] = _convert(hints[name], value, prefix + key)
    return values


def _convert(hint: Any, value: Any, name: str) -> Any:
    """The value as the type `hint`: tables become dataclasses, lists become tuples, whole numbers become floats."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        options = [option for option in arguments if option is not type(None)]
        if len(options) == 1:
            return _convert(options[0], value, name)
    if origin is typing.Literal:
        if value in arguments:
            return value
        raise ValueError(f"{name} = {value!r}: must be one of {', '.join(map(repr, arguments))}")
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return from_table(hint, value, name + ".")  # type: ignore[arg-type]
    if origin is tuple and isinstance(value, list):
        element = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        if len(element) != len(value):
            raise ValueError(f"{name}: needs {len(element)} values, has {len(value)}")
        return tuple(_convert(h, v, f"{name}.{i}") for i, (h, v) in enumerate(zip(element, value, strict=True)))
    if hint is float and type(value) is int:
        return float(value)
    if isinstance(hint, type) and type(value) is hint:
        return value
    expected = getattr(hint, "__name__", str(hint))
    if origin is tuple or dataclasses.is_dataclass(hint):
        expected = "a list" if origin is tuple else "a table"
    raise ValueError(f"{name} = {value!r}: must be {expected}, is {type(value).__name__}")


def to_table(settings: Any) -> dict[str, Any]:
    """The settings as plain TOML values. Fields that are None are left out: TOML has no null."""
    return dataclasses.asdict(settings, dict_factory=lambda pairs: {key: value for key, value in pairs if value is not None})


def defaults(settings_class: type) -> dict[str, Any]:
    """The values of all settings that have a default, as plain TOML values without None."""
    table = {}
    for field in dataclasses.fields(settings_class):
        value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if value is not dataclasses.MISSING and value is not None:
            table[field.name] = to_table(value) if dataclasses.is_dataclass(value) else value
    return table


def to_toml(settings: Any) -> str:
    """The settings as TOML text that `read_toml` turns into an equal object."""
    import tomli_w  # here, as only writing a file needs it

    return tomli_w.dumps(to_table(settings))
