"""How the command line counts peers and names their ports."""

from __future__ import annotations

from peerd.settings import SupervisorSettings


def counted(count: int, noun: str) -> str:
    return f"1 {noun}" if count == 1 else f"{count} {noun}s"


def ports(settings: SupervisorSettings) -> str:
    if settings.peers == 1:
        return f"UDP port {settings.base_port}"
    return f"UDP ports {settings.base_port} to {settings.last_port}"
