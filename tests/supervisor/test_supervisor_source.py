"""Calls that the supervisor's code must not contain."""

import ast
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "peerd" / "supervisor"
SOURCES = list(FOLDER.glob("*.py"))

WALL_CLOCK = {
    "time.time",
    "time.time_ns",
    "time.localtime",
    "time.gmtime",
    "datetime.now",
    "datetime.utcnow",
    "datetime.today",
}
"""A step of the clock would end a timeout early, or never."""

BY_PID = {"os.kill", "os.killpg", "os.waitpid", "os.wait", "os.wait3", "os.wait4"}
"""A pid may have been reused; a pidfd cannot be."""

ALLOWED_BY_PID = {
    # Between waitid(WNOWAIT) and waitid: the pid is the dead child's, and so is its group.
    ("processes.py", "wait", "os.killpg"),
    # The pidfd could not be opened, and the child has not been reaped.
    ("processes.py", "spawn", "os.kill"),
    ("processes.py", "spawn", "os.waitpid"),
    # A zombie that waitid(WNOWAIT) has just reported, so it still has its pid.
    ("processes.py", "reap_orphans", "os.waitpid"),
}


def calls(path: Path) -> list[tuple[str, str]]:
    """(enclosing function, full name of the callee), aliases of imports resolved."""
    tree = ast.parse(path.read_text())
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                # "datetime.datetime.now" and "datetime.now" are the same.
                full = alias.name if node.module == alias.name else f"{node.module}.{alias.name}"
                names[alias.asname or alias.name] = full
    found = []

    def visit(node: ast.AST, function: str) -> None:
        if isinstance(node, ast.FunctionDef):
            function = node.name
        if isinstance(node, ast.Attribute | ast.Name):
            first, dot, rest = ast.unparse(node).partition(".")
            full = f"{names.get(first, first)}{dot}{rest}"
            found.append((function, full.replace("datetime.datetime.", "datetime.")))
        for child in ast.iter_child_nodes(node):
            visit(child, function)

    visit(tree, "")
    return found


def test_time_is_monotonic_and_no_process_is_signalled_or_reaped_by_a_bare_pid() -> None:
    found = {(path.name, *call) for path in SOURCES for call in calls(path)}
    assert {call for call in found if call[-1] in WALL_CLOCK | BY_PID} == ALLOWED_BY_PID


def test_forbidden_calls_are_found(tmp_path: Path) -> None:
    source = tmp_path / "source.py"
    source.write_text(
        "import os, time as clock\nfrom datetime import datetime as dt\nfrom os import kill as k\n"
        "def f(): clock.time(); dt.now(); k(1, 2); later(os.killpg)\n"
    )
    assert {("f", "time.time"), ("f", "datetime.now"), ("f", "os.kill"), ("f", "os.killpg")} <= set(
        calls(source)
    )
