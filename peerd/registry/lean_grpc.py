"""gRPC with less memory, for the registrar of every supervisor.

Both functions depend on details of gRPC and Linux. They stay because the registrar is most of what peerd
needs more than other supervisors (benchmarks/supervisors.py): they save 2 and 7 of its 30 MiB (USS).
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from types import ModuleType

MADV_DONTNEED = 4  # asm-generic/mman-common.h


@contextlib.contextmanager
def without_asyncio() -> Iterator[None]:
    """Import gRPC without its asyncio interface, which imports OpenSSL for Python in addition to gRPC's own:
    2 MiB that the registrar does not use."""
    sys.modules["grpc.aio"] = ModuleType("grpc.aio")
    sys.modules["ssl"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["ssl"]  # tls.py uses it to find out what is wrong with a certificate


def release_code() -> None:
    """Release the pages of gRPC's code, most of which was used only during the import. Pages that are used
    again come back from the page cache (madvise(2): a private mapping of an unmodified file)."""
    libc = ctypes.CDLL(None)
    with open("/proc/self/maps") as file:
        for line in file:
            addresses, permissions, _, _, inode, *_ = line.split()
            if permissions == "r-xp" and inode != "0":  # never written, so without relocations
                start, end = (int(address, 16) for address in addresses.split("-"))
                libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_DONTNEED)
