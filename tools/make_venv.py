"""Make the virtual environment, or say what this machine lacks for it: make_venv.py FOLDER

Runs under Python 3.7 and newer, so that an old one gets a sentence and not a SyntaxError. Debian's python3
comes without ensurepip (it is in the package python3-venv): then pip is fetched from the package
index, checked against the hash that the index gives for it, and installed by itself.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import urllib.parse
import urllib.request

MINIMUM = (3, 11)


def main() -> None:
    folder = sys.argv[1]
    check_machine()
    print("making the virtual environment %s with Python %s" % (folder, sys.version.split()[0]))
    try:
        import ensurepip  # noqa: F401

        subprocess.check_call([sys.executable, "-m", "venv", folder])
    except ImportError:
        subprocess.check_call([sys.executable, "-m", "venv", "--without-pip", folder])
        install_pip(os.path.join(folder, "bin", "python"))


def check_machine() -> None:
    missing = []
    if sys.version_info < MINIMUM:
        missing.append(
            "Python 3.11 or newer: this is %s. With another one installed: make PYTHON=python3.12 ..."
            % sys.version.split()[0]
        )
    header = os.path.join(sysconfig.get_paths()["include"], "Python.h")
    if not os.path.exists(header):
        missing.append("the Python headers (%s): apt-get install python3-dev" % header)
    compiler = os.environ.get("CC", "gcc").split()[0]
    if not shutil.which(compiler):
        missing.append("a C compiler (%s): apt-get install gcc libc6-dev" % compiler)
    elif not os.path.exists("/usr/include/stdio.h") and "CC" not in os.environ:
        missing.append("the C library's headers: apt-get install libc6-dev")
    if sys.platform != "linux":
        missing.append("Linux: peerd is built on recvmmsg, pidfds and /proc")
    if missing:
        sys.exit("peerd cannot be built here. Missing:\n  " + "\n  ".join(missing))


def install_pip(python: str) -> None:
    index = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple").rstrip("/") + "/pip/"
    print("this Python has no ensurepip: fetching pip from %s" % index)
    try:
        with urllib.request.urlopen(index, timeout=60) as answer:
            page = answer.read().decode()
        link, sha256 = newest_wheel(page)
        with urllib.request.urlopen(urllib.parse.urljoin(index, link), timeout=60) as answer:
            wheel = answer.read()
    except (OSError, ValueError) as error:
        sys.exit("cannot fetch pip (%s): apt-get install python3-venv instead" % error)
    if hashlib.sha256(wheel).hexdigest() != sha256:
        sys.exit("the pip from %s is not the one that the index describes" % index)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, os.path.basename(urllib.parse.urlparse(link).path))
        with open(path, "wb") as file:
            file.write(wheel)
        # A wheel is a zip file, and Python runs what is inside (the trick of get-pip.py).
        command = [python, os.path.join(path, "pip"), "install", "--quiet", "--no-index", path]
        subprocess.check_call(command)


def newest_wheel(page: str) -> tuple[str, str]:
    """(link, sha256) of the newest final release on a simple index page (PEP 503)."""
    pattern = r'href="([^"#]*/pip-(\d+(?:\.\d+)*)-py3-none-any\.whl)#sha256=([0-9a-f]{64})"'
    found = [
        (tuple(int(part) for part in version.split(".")), link, sha256)
        for link, version, sha256 in re.findall(pattern, page)
    ]
    if not found:
        raise ValueError("no wheel of pip on the page")
    _, link, sha256 = max(found)
    return link, sha256


if __name__ == "__main__":
    main()
