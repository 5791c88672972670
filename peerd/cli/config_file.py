"""``peerd.toml``: the options of ``peerd supervise``, under the names of their flags."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from peerd.cli.option_types import SIZE, Seconds
from peerd.cli.options import did_you_mean


class BadConfigError(click.ClickException):
    exit_code = os.EX_CONFIG


def read_config(
    path: Path, parameters: Mapping[str, click.Parameter], ctx: click.Context
) -> dict[str, Any]:
    """The values of a file by parameter name. ``parameters`` are those it may set, by flag without dashes.

    Raises BadConfigError that lists every problem of the file, one per line.
    """
    import tomllib

    try:
        values = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise BadConfigError(f"{path}: {reason}") from None
    found, problems, lists_all = {}, [], False
    for key, value in values.items():
        flag = key.replace("_", "-")
        if flag not in parameters:
            hint = did_you_mean(flag, parameters)
            lists_all |= not hint
            problems.append(f"{path}: unknown setting {key!r}{hint}")
            continue
        parameter = parameters[flag]
        kinds, name = _wanted(parameter)
        if type(value) not in kinds:
            problems.append(f"{path}: {key} is {name}, not {_kind(value)}: {_shortened(value)}")
            continue
        try:
            # Converted as text, so that the flag and the file share rules and messages.
            found[str(parameter.name)] = parameter.type_cast_value(ctx, str(value))
        except click.BadParameter as error:
            problems.append(f"{path}: {key}: {error.message}")
    if lists_all:
        problems.append(f"{path}: known settings: {', '.join(sorted(parameters))}")
    if problems:
        raise BadConfigError("\n".join(problems))
    return found


def _wanted(parameter: click.Parameter) -> tuple[tuple[type, ...], str]:
    """The TOML types that a parameter takes, and their name in messages."""
    if isinstance(parameter, click.Option) and parameter.is_flag:
        return (bool,), "true or false"
    if isinstance(parameter.type, Seconds):
        return (int, float), "a number"
    if parameter.type is SIZE:
        return (int, str), "an integer or a string such as '64M'"
    if isinstance(parameter.type, click.types.IntParamType):
        return (int,), "an integer"
    return (str,), "a string"


def _kind(value: object) -> str:
    names = {bool: "a boolean", int: "an integer", float: "a float"}
    names |= {str: "a string", list: "an array", dict: "a table"}
    return names.get(type(value), "a date or time")


def _shortened(value: object) -> str:
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
