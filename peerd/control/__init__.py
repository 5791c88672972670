"""Talking to a running supervisor over its control socket: the client's side."""

from peerd.control.client import find_running, has_listener, request
from peerd.control.protocol import default_path, directory

__all__ = ["default_path", "directory", "find_running", "has_listener", "request"]
