"""The layers of ARCHITECTURE.md: a module imports only from its own layer and those above it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("peerd", "peerd_chaos")


def layers() -> dict[str, int]:
    """The table of ARCHITECTURE.md, top to bottom."""
    text = (ROOT / "ARCHITECTURE.md").read_text().split("<!-- layers -->")[1]
    rows = [line.split("|")[2] for line in text.splitlines() if line.startswith("| ")][1:]
    return {name.strip(" `"): number for number, row in enumerate(rows) for name in row.split(",")}


LAYERS = layers()
"""The longest entry that is a prefix of a module's name has its layer; ``peerd`` is no such prefix."""

# The command line passes these three to each other; they do not import each other.
STRANGERS = {"peerd.serving.worker", "peerd.registry.registrar", "peerd.supervisor"}


def modules() -> dict[str, Path]:
    found = {}
    for path in (path for name in PACKAGES for path in (ROOT / name).rglob("*.py*")):
        if path.suffix not in (".py", ".pyi"):
            continue
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


def imports(path: Path) -> set[str]:
    """Every module of the packages that a file imports, at any place in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            names = {f"{module}.{alias.name}" for alias in node.names}
            found |= {name if name in modules() else module for name in names}
    return {name for name in found if name.split(".")[0] in PACKAGES}


def home(module: str) -> tuple[int, str]:
    """The layer of a module, and the entry of the table that has it."""
    entry = module
    while entry not in LAYERS:
        entry = entry.rpartition(".")[0]
        assert entry not in ("", "peerd"), f"{module} has no layer: add it to ARCHITECTURE.md"
    return LAYERS[entry], entry


@pytest.mark.parametrize("module", sorted(modules()))
def test_a_module_imports_from_above_only(module: str) -> None:
    layer, entry = home(module)
    for imported in imports(modules()[module]):
        other_layer, other = home(imported)
        if other == entry:
            continue
        assert other_layer <= layer, f"{module} imports {imported}, which is below it"
        assert not {entry, other} <= STRANGERS, f"{module} imports {imported}: hand it in"


def in_a_fresh_interpreter(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize("module", sorted(modules()))
def test_each_module_imports_alone(module: str) -> None:
    if module != "peerd.__main__":
        in_a_fresh_interpreter(f"import {module}")


def test_modules_that_run_before_a_fork_do_not_import_grpc() -> None:
    early = "peerd.cli.commands.supervise, peerd.serving.worker, peerd.registry.registrar"
    code = f"import sys, {early}; print([m for m in ('grpc', 'etcd3') if m in sys.modules])"
    assert in_a_fresh_interpreter(code) == "[]"


def test_only_the_command_line_prints_or_exits() -> None:
    for module, path in modules().items():
        if module.startswith(("peerd.cli", "peerd.__main__", "peerd_chaos.chaos_command")):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("print", "sys.exit", "logging.basicConfig"), (
                    f"{module}: {called}"
                )
