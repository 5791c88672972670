"""The supervisor compared with supervisord and circus. See ``python benchmarks/supervisors.py --help``."""

import sys

from bench.script import run

if __name__ == "__main__":
    # supervisord needs libcrypto to itself, as without this program, or its USS lacks 4 MiB. So this
    # process must not import ssl.
    sys.modules["ssl"] = None  # type: ignore[assignment]
    run("contenders.supervisor_benchmark")
