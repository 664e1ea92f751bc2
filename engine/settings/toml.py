"""Settings: frozen dataclasses, read from TOML, overridden on the command line by dotted names, saved resolved.

A recipe declares its settings as a frozen dataclass, with nested dataclasses for groups, and calls `parse`. This module checks
names and types; each class checks its ranges in `__post_init__`. A wrong file is refused before any work starts.

The reader is our own: msgspec and cattrs name neither the wrong value nor the nearest known key, and cannot build the
incomplete draft that command-line overrides complete.
"""

import dataclasses
import difflib
import keyword
import sys
import tomllib
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

Settings = TypeVar("Settings")

_PATH = "a path, in which ~ means the home folder"
PathName = Annotated[str, _PATH]
"""The type of a setting that names a file or folder: a leading ~ becomes the home folder, as the shell does outside quotes."""


def option(name: str) -> Any:
    """Names a setting's option where Python keeps the word for itself: `from_: Annotated[str, option("from")]`.

    Settings that are made in code need no tyro, as on a machine that has torch alone.
    """
    try:
        import tyro
    except ImportError:
        return f"--{name}"
    return tyro.conf.arg(name=name)


def parse(settings_class: type[Settings], argv: Sequence[str] | None = None, *, prog: str | None = None) -> Settings:
    """Read settings from an optional TOML file (anywhere among the arguments) and dotted overrides.

    `python -m recipes.sft recipes/tiny/sft1.toml --steps 10 --schedule.peak 1e-4` is
    `parse(SftSettings, ["recipes/tiny/sft1.toml", "--steps", "10", ...])`. Overrides may add keys that the file lacks; ranges
    are checked after them.

    Raises: SystemExit. A mistake in the file, or a setting that neither gives, ends the program with one line on standard error
        and status 1; another mistake on the command line ends it with tyro's message and status 2.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        file = _taken_file(settings_class, arguments)
        if file is None:
            default = _draft(settings_class, {})
        elif not arguments:
            return read_toml(settings_class, file)
        else:
            default = _in_file(Path(file), _draft, settings_class, read_table(Path(file)))
        _check_no_tables(settings_class, arguments)
        _check_nothing_missing(default, arguments, prog)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from None
    import tyro  # here, as only a command line with options needs it

    given = tyro.cli(settings_class, args=arguments, prog=prog, default=default, description=_description(settings_class, prog))
    try:
        return _with_homes(given)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


def _taken_file(settings_class: type, arguments: list[str]) -> str | None:
    """Take the name of the TOML file out of the arguments; None where there is none.

    Raises: ValueError for two files, or a first argument that is neither an option nor a TOML file.
    """
    files = [argument for argument in arguments if argument.endswith(".toml") and not argument.startswith("-")]
    if len(files) > 1:
        raise ValueError(f"{files[1]}: a second settings file, beside {files[0]}: name one, and give the rest as options")
    if not files:
        if not arguments or arguments[0].startswith("-"):
            return None
        files = [arguments[0]]
        if not Path(files[0]).is_file():
            raise ValueError(f"{files[0]}: {_no_settings_file(settings_class, files[0])}")
    arguments.remove(files[0])
    return files[0]


def _check_no_tables(settings_class: type, arguments: list[str]) -> None:
    """Refuse a list of tables as an option by one line: tyro would list every option of its first table."""
    for name, hint in typing.get_type_hints(settings_class).items():
        asked = next((argument for argument in arguments if argument.partition("=")[0] == f"--{name}"), None)
        if asked is not None and (element := _table_of(hint)) is not None:
            key = dataclasses.fields(element)[0].name
            raise ValueError(
                f"{asked}: add {name} in the TOML file, each as a table ([[{name}]] {key} = ...); an option can change one "
                f"that stands there (--{name}.0.{key} ...)"
            )


def _check_nothing_missing(draft: Any, arguments: list[str], prog: str | None) -> None:
    """Refuse settings that neither file nor options give by one line: tyro would explain each in a box."""
    options = [argument.partition("=")[0].removeprefix("--") for argument in arguments if argument.startswith("--")]
    given = {_field_of(option.partition(".")[0]) for option in options}
    fields = {field.name for field in dataclasses.fields(draft)}
    if "-h" in arguments or not given <= fields | {f"no_{name}" for name in fields}:
        # Help, or a misspelt option, which may be the missing one: tyro names the nearest.
        return
    hints = typing.get_type_hints(type(draft))
    missing = [name for name in _required(type(draft)) if name not in given and _is_absent(getattr(draft, name))]
    if missing:
        name, table = missing[0], _table_of(hints[missing[0]])
        others = f" (and {', '.join(missing[1:])})" if missing[1:] else ""
        if table is not None:
            key = dataclasses.fields(table)[0].name
            raise ValueError(f"missing setting '{name}'{others}: add it in a TOML file, as tables ([[{name}]] {key} = ...)")
        raise ValueError(
            f"missing setting '{name}'{others}: give --{name.replace('_', '-')}, or {name} = ... in a TOML file: "
            f"{prog or 'the command'} SETTINGS.toml [OPTIONS]"
        )


def _no_settings_file(settings_class: type, argument: str) -> str:
    """Why an argument that is no file and no option cannot be used, and which option may be meant."""
    found = "is a folder" if Path(argument).is_dir() else "no such settings file"
    hints = typing.get_type_hints(settings_class, include_extras=True)
    paths = [name for name in hints if hints[name] in (PathName, tuple[PathName, ...])]
    meant = next((name for name in ("model", "source", "paths", "text") if name in paths), None)
    option = f" as an option, such as --{meant} {argument}" if meant else " as an option"
    return f"{found}; the only argument without an option's name is a TOML file of settings; name everything else{option}"


def _description(settings_class: type, prog: str | None) -> str:
    """What `--help` says above the options."""
    lists = []
    hints = typing.get_type_hints(settings_class)
    for name in _required(settings_class):
        if (element := _table_of(hints[name])) is not None:
            keys = ", ".join(field.name for field in dataclasses.fields(element))
            lists.append(f"[[{name}]] tables can be added in the file alone, with the keys {keys}. {_sentences(element)}")
    file = (
        f"Settings come from a TOML file, from options, or from both; an option overrides the file's key: "
        f"{prog or 'the command'} SETTINGS.toml [OPTIONS]. The option --a.b-c is the key b_c of the table [a]."
    )
    return "\n\n".join([_sentences(settings_class), file, *lists])


def _sentences(settings_class: type) -> str:
    return " ".join((settings_class.__doc__ or "").split())


def _table_of(hint: Any) -> type | None:
    """The dataclass of a list of tables; None for another type."""
    element = typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else None
    return element if isinstance(element, type) and dataclasses.is_dataclass(element) else None


def _with_homes(settings: Settings) -> Settings:
    """The settings with the home folder in place of a leading ~ in every path, which would else name a folder '~'.

    Raises: ValueError for an empty path, which would mean the current folder, where the setting is not empty by default.
    """
    changes = {}
    hints = typing.get_type_hints(type(settings), include_extras=True)
    for field in dataclasses.fields(settings):  # type: ignore[arg-type]
        value = getattr(settings, field.name)
        if field.default != "" and any(each == "" and _is_path(hint) for hint, each in _items(hints[field.name], value)):
            raise ValueError(f"{field.name} is empty: name a file or folder (. is the current folder)")
        expanded = _with_home(hints[field.name], value)
        if expanded != value:
            changes[field.name] = expanded
    return dataclasses.replace(settings, **changes) if changes else settings  # type: ignore[type-var]


def _with_home(hint: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return _with_homes(value)
    if isinstance(value, tuple):
        return tuple(_with_home(element, each) for element, each in _items(hint, value))
    return str(Path(value).expanduser()) if _is_path(hint) and isinstance(value, str) and value.startswith("~") else value


def named(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any, bool]]:
    """Each single value of the settings: its dotted name (`sources.0.path`), the value, and whether it is a path.

    Settings that are None are left out, as in `to_table`.
    """
    hints = typing.get_type_hints(type(settings), include_extras=True)
    for field in dataclasses.fields(settings):
        value, name = getattr(settings, field.name), prefix + field.name
        numbered = isinstance(value, tuple)
        for number, (hint, each) in enumerate(_items(hints[field.name], value)):
            full = f"{name}.{number}" if numbered else name
            if dataclasses.is_dataclass(each):
                yield from named(each, full + ".")
            elif each is not None:
                yield full, each, _is_path(hint)


def _items(hint: Any, value: Any) -> list[tuple[Any, Any]]:
    """(type, value) of a value alone, or of each element of a list."""
    element = next(iter(typing.get_args(hint)), None)
    return [(element, each) for each in value] if isinstance(value, tuple) else [(hint, value)]


def _is_path(hint: Any) -> bool:
    """Whether the type is `PathName`, or PathName | None."""
    return any(_PATH in getattr(option, "__metadata__", ()) for option in (hint, *typing.get_args(hint)))


def read_toml(settings_class: type[Settings], path: str | Path) -> Settings:
    """Settings from a TOML file.

    Raises: FileNotFoundError; ValueError naming the file and the key for broken TOML, an unknown key (with the nearest known
        one), a wrong type or a value out of range.
    """
    path = Path(path)
    return _with_homes(_in_file(path, from_table, settings_class, read_table(path)))


def read_table(path: Path) -> dict[str, Any]:
    """The content of a TOML file. Raises: FileNotFoundError, ValueError naming the file."""
    path = path.expanduser()
    if path.is_dir():
        raise FileNotFoundError(f"{path}: is a folder, not a settings file")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such settings file")
    try:
        # Some editors put a byte-order mark in front.
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
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
        values.setdefault(name, tyro.MISSING if _table_of(hints[name]) is None else ())
    draft = object.__new__(settings_class)
    for field in dataclasses.fields(settings_class):  # type: ignore[arg-type]
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        object.__setattr__(draft, field.name, values.get(field.name, default))
    return draft


def _is_absent(value: Any) -> bool:
    """Whether a required setting of a draft was not given."""
    import tyro

    return value is tyro.MISSING or value == ()


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
        name = _field_of(key)
        if name not in fields:
            nearest = difflib.get_close_matches(name, map(key_of, fields), n=1, cutoff=0.0)
            raise ValueError(f"unknown key '{prefix}{key}'; the nearest known one is '{prefix}{nearest[0]}'")
        if name in values:
            raise ValueError(f"'{prefix}{name}' is given twice, spelled with - and with _")
        values[name] = _convert(hints[name], value, prefix + key)
    return values


def key_of(field: str) -> str:
    """The name of a field in files and options: a field that would bear a word of Python's bears it with _ behind."""
    word = field.removesuffix("_")
    return word if keyword.iskeyword(word) else field


def _field_of(key: str) -> str:
    name = key.replace("-", "_")
    return name + "_" if keyword.iskeyword(name) else name


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
    return dataclasses.asdict(settings, dict_factory=_table)


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {key_of(field): value for field, value in pairs if value is not None}


def defaults(settings_class: type) -> dict[str, Any]:
    """The values of all settings that have a default, as plain TOML values without None."""
    table = {}
    for field in dataclasses.fields(settings_class):
        value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if value is not dataclasses.MISSING and value is not None:
            table[key_of(field.name)] = to_table(value) if dataclasses.is_dataclass(value) else value
    return table


def to_toml(settings: Any) -> str:
    """The settings as TOML text that `read_toml` turns into an equal object."""
    import tomli_w  # here, as only writing a file needs it

    return tomli_w.dumps(to_table(settings))
