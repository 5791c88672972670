"""Options generated from dataclass fields: the metadata of a field has its flag and its help (settings.Flag),
and its type decides what the option accepts."""

from __future__ import annotations

import enum
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import click

from peerd.address import Address
from peerd.cli.option_types import HOST_PORT, POSITIVE_SECONDS, SIZE
from peerd.settings import FLAG, Flag

T = TypeVar("T")
Command = Callable[..., Any]


class FieldOption(click.Option):
    """Knows the section of ``--help`` that lists it."""

    def __init__(self, *args: Any, section: str, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.section = section


def add_options(command: Command, settings: type, only: Collection[str] | None = None) -> Command:
    """Decorate a function with the options of all fields with a flag, nested dataclasses included.

    A parameter is named after its flag: the value of ``--base-port`` is passed as ``base_port``.
    ``only`` are the flags to take.
    """
    chosen = [
        (flag, field, kind)
        for flag, field, kind in _flags(settings)
        if only is None or flag.name in only
    ]
    for flag, field, kind in reversed(chosen):
        default = field.default.value if isinstance(field.default, enum.Enum) else field.default
        option = click.option(
            f"--{flag.name}/--no-{flag.name}" if kind is bool else f"--{flag.name}",
            cls=FieldOption,
            section=flag.section,
            type=_option_type(field.name, flag.reads or kind),
            default=default,
            show_default=default is not None and "[default: " not in flag.help,
            metavar=flag.metavar,
            envvar=f"PEERD_{flag.parameter.upper()}",
            help=flag.help,
        )
        command = option(command)
    return command


def flags_of(settings: type) -> list[Flag]:
    return [flag for flag, _, _ in _flags(settings)]


def settings_from(settings: type[T], values: Mapping[str, Any], **parts: object) -> T:
    """Build a dataclass from the values of its options. ``parts`` are fields whose value is given instead.

    An option without a value leaves the default of its field. Raises SettingsError.
    """
    given: dict[str, Any] = {}
    for field, kind in _fields(settings):
        if field.name in parts:
            given[field.name] = parts[field.name]
        elif is_dataclass(kind):
            assert isinstance(kind, type)
            given[field.name] = settings_from(kind, values, **parts)
        elif FLAG in field.metadata:
            value = values[field.metadata[FLAG].parameter]
            if value is not None:
                is_enum = isinstance(kind, type) and issubclass(kind, enum.Enum)
                given[field.name] = kind(value) if is_enum else value
    return settings(**given)


def _flags(settings: type) -> Iterator[tuple[Flag, Field[Any], Any]]:
    for field, kind in _fields(settings):
        if is_dataclass(kind):
            assert isinstance(kind, type)
            yield from _flags(kind)
        elif FLAG in field.metadata:
            yield field.metadata[FLAG], field, kind


def _fields(settings: Any) -> Iterator[tuple[Field[Any], Any]]:
    """Each field with its type; of ``X | None``, X."""
    hints = get_type_hints(settings)
    for field in fields(settings):
        kind = hints[field.name]
        if get_origin(kind) in (Union, types.UnionType):
            (kind,) = [member for member in get_args(kind) if member is not type(None)]
        yield field, kind


def _option_type(name: str, kind: Any) -> Any:
    if get_origin(kind) is Literal:
        return click.Choice(get_args(kind))
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return click.Choice([member.value for member in kind])
    if kind is Path:
        return click.Path(path_type=Path)
    if kind is Address:
        return HOST_PORT
    if kind is float:
        return POSITIVE_SECONDS
    if kind is int and name.endswith("_bytes"):
        return SIZE
    return kind
