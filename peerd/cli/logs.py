"""How log lines look: time, level, process, text; one line, one write."""

from __future__ import annotations

import logging
import os
import sys


def configure(level: str) -> None:
    """Log to standard error from ``level`` on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def name_process(name: str) -> None:
    """What this process calls itself in its log lines from now on."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler.formatter, _Formatter):
            handler.formatter.process_name = name


class _Formatter(logging.Formatter):
    default_msec_format = "%s.%03d"

    def __init__(self) -> None:
        super().__init__("{asctime} {levelname:<8} {who}: {message}", style="{")
        self.process_name = "supervisor"

    def format(self, record: logging.LogRecord) -> str:
        record.who = f"{self.process_name}[{os.getpid()}]"
        return super().format(record)
