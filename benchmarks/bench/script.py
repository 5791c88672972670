"""Runs a benchmark as a script, and translates errors and signals to exit codes."""

from __future__ import annotations

import importlib
import signal
import sys
from pathlib import Path


def run(module: str) -> None:
    """Call ``main()`` of a module, which returns the exit code, and exit with it."""
    # SIGTERM ends it like Ctrl-C, so that it ends its children first.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # For the etcd cluster of tests/harness.
    sys.path.append(str(Path(__file__).parents[2] / "tests"))
    name = sys.argv[0].rpartition("/")[2].removesuffix(".py")
    try:
        benchmark = importlib.import_module(module)
        from bench.children import BenchmarkError
        from peerd.errors import PeerdError
    except ImportError as error:
        sys.exit(f"{name}: {error}. Build and install peerd: pip install -e '.[bench,embedded]'")
    try:
        sys.exit(benchmark.main())
    except (BenchmarkError, PeerdError) as error:
        sys.exit(f"{name}: {error}")
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
