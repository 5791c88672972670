"""What help() shows of the public names, and whether a program can import every type that they use."""

import inspect
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import peerd
import peerd.registry

PUBLIC = {
    name: getattr(module, name)
    for module in (peerd, peerd.registry)
    for name in module.__all__
    if not name.startswith("__")
}
ROOT = Path(__file__).parents[2]
MADE_BY_REGISTRY = {"Cache", "Registration", "Watch"}
"""Users do not call these constructors."""


def members(kind: type) -> Iterator[tuple[str, Any]]:
    """The public methods and properties that a class defines, and its constructor."""
    for name, member in vars(kind).items():
        function = member.fget if isinstance(member, property) else member
        function = getattr(function, "__func__", function)
        if callable(function) and (name == "__init__" or not name.startswith("_")):
            yield name, function


def peerd_types(annotation: Any) -> set[str]:
    inner = set().union(*map(peerd_types, typing.get_args(annotation)))
    if isinstance(annotation, type) and annotation.__module__.startswith("peerd"):
        return {annotation.__name__}
    if isinstance(annotation, list):  # the arguments of a Callable
        return set().union(*map(peerd_types, annotation))
    return inner


@pytest.mark.parametrize("name", PUBLIC)
def test_help_is_not_empty(name: str) -> None:
    item = PUBLIC[name]
    assert item.__doc__
    if inspect.isclass(item):
        missing = [
            method
            for method, _ in members(item)
            if method != "__init__" and not inspect.getdoc(getattr(item, method))
        ]
        assert not missing


@pytest.mark.parametrize("name", PUBLIC)
def test_every_type_of_a_signature_is_public(name: str) -> None:
    item = PUBLIC[name]
    if not inspect.isclass(item):
        functions = [item]
    else:
        functions = [
            function
            for method, function in members(item)
            if not (method == "__init__" and name in MADE_BY_REGISTRY)
        ]
    for function in functions:
        hints = typing.get_type_hints(function, localns=PUBLIC)
        used = set().union(*map(peerd_types, hints.values()))
        assert used <= PUBLIC.keys(), function


def test_an_unbuilt_checkout_says_what_to_run(tmp_path: Path) -> None:
    for source in (ROOT / "peerd").rglob("*.py"):
        copy = tmp_path / source.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(source.read_bytes())
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import peerd"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert last.startswith(
        f"ImportError: peerd._envelope is not built: run 'make build' in {tmp_path} "
    )
