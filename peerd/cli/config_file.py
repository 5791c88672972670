"""``peerd.toml``: the options of ``peerd supervise``, by the names of their flags."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from peerd.cli.option_types import SIZE, Seconds
from peerd.cli.options import did_you_mean


class BadConfigError(click.ClickException):
    exit_code = 78


def read_config(
    path: Path, parameters: Mapping[str, click.Parameter], ctx: click.Context
) -> dict[str, Any]:
    """The file's values by parameter. ``parameters`` are what it may set, by flag without the dashes.

    Raises BadConfigError that names everything that is wrong with it, a line each.
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
            # As text, so that the rules and the words are those of the flag.
            found[str(parameter.name)] = parameter.type_cast_value(ctx, str(value))
        except click.BadParameter as error:
            problems.append(f"{path}: {key}: {error.message}")
    if lists_all:
        problems.append(f"{path}: there are: {', '.join(sorted(parameters))}")
    if problems:
        raise BadConfigError("\n".join(problems))
    return found


def _wanted(parameter: click.Parameter) -> tuple[tuple[type, ...], str]:
    """The types of TOML that a parameter takes, and what to call them."""
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
    names = {
        bool: "a boolean",
        int: "an integer",
        float: "a float",
        str: "a string",
        list: "an array",
        dict: "a table",
    }
    return names.get(type(value), "a date or time")


def _shortened(value: object) -> str:
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
