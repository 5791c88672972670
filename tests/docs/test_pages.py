"""What README.md and docs/ point to exists: tests, files and sections. The README is short."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")]
TESTS = {path: path.read_text() for path in ROOT.glob("tests/**/test_*.py")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_named_test_exists(page: Path) -> None:
    files = {path.name for path in TESTS}
    functions = set(
        re.findall(r"^(?:async )?def (test_\w+)", "\n".join(TESTS.values()), re.MULTILINE)
    )
    named = set(re.findall(r"`(?:\w+/)*(test_\w+(?:\.py)?)`", page.read_text()))
    assert named <= files | functions


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_link_has_a_target(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]*(?:#[^)]*)?)\)", page.read_text()):
        if link.startswith("http"):
            continue
        name, _, section = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        if section:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            anchors = {
                re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in headings
            }
            assert section in anchors, link


def test_the_page_of_commands_is_current() -> None:
    program = [sys.executable, str(ROOT / "tools" / "cli_page.py")]
    done = subprocess.run(program, capture_output=True, text=True, check=True)
    assert done.stdout == (ROOT / "docs" / "cli.md").read_text(), (
        "run tools/cli_page.py > docs/cli.md"
    )


def test_the_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    long = [line for line in prose.splitlines() if len(line) > 120 and not line.startswith("|")]
    assert not long
