"""The sdist builds a wheel, and both have the right files."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(300)
def test_the_sdist_builds_a_wheel(tmp_path: Path) -> None:
    # Without isolation, because the test extra has the build requirements. python -m build makes the sdist
    # first, and the wheel from the sdist.
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)],
        check=True,
        capture_output=True,
    )
    (sdist,) = tmp_path.glob("*.tar.gz")
    (wheel,) = tmp_path.glob("*.whl")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"ext/peerd/_loop.pyx", "ext/peerd/wire.pxd", "tests/conftest.py", "Makefile"} <= names
    assert not [name for name in names if name.endswith(".so") or name == "ext/peerd/_loop.c"]
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {
        "peerd/py.typed",
        "peerd/_loop.pyi",
        "peerd/cli/__init__.py",
        "peerd/cli/commands/peerd.service.in",
        "peerd_chaos/chaos_command.py",
    } <= names
    compiled = {Path(name).name.partition(".")[0] for name in names if name.endswith(".so")}
    assert compiled == {path.stem for path in ROOT.glob("ext/peerd/*.pyx")}
    assert not [name for name in names if name.endswith((".c", ".pyx", ".pxd"))]
