"""``peerd etcd``"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import click

from peerd.errors import BindError, RegistryUnavailableError
from peerd.registry.embedded_etcd import HOW_TO_GET_ETCD, command, find_etcd, is_listening
from peerd.settings import DEFAULT_ENDPOINT


@click.command()
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    default=23790,
    show_default=True,
    help="Port for clients, on loopback.",
)
@click.option(
    "--data-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Keep the data in this folder. Without it, the data is deleted at the end.",
)
def etcd(port: int, data_dir: Path | None) -> None:
    """Run one etcd on loopback in the foreground, as 'peerd supervise' would start it.

    For trials and tests. In production, run an etcd cluster and pass it to peerd with --etcd.

    \b
    Exit codes:
      0    stopped by SIGTERM or Ctrl-C
      1    etcd failed
      69   no etcd is installed
      73   the port is taken
    """
    binary = find_etcd()
    if binary is None:
        raise RegistryUnavailableError(HOW_TO_GET_ETCD)
    url = f"http://127.0.0.1:{port}"
    if is_listening(url):
        raise BindError(f"TCP port {port} is taken: choose another with --port")
    directory = data_dir or Path(tempfile.mkdtemp(prefix="peerd-etcd-"))
    kept = "" if data_dir else ", data deleted at the end"
    name = (
        "peerd uses this endpoint by default"
        if f":{port}" in DEFAULT_ENDPOINT
        else f"use --etcd {url}"
    )
    click.echo(f"etcd at {url} ({binary}{kept}); {name}; Ctrl-C stops it", err=True)
    try:
        process = subprocess.Popen(command(binary, url, directory, durable=data_dir is not None))
        for number in (signal.SIGTERM, signal.SIGINT):
            # The terminal sends Ctrl-C to etcd as well, but kill(1) sends to this process only.
            signal.signal(number, lambda number, _: process.send_signal(number))
        code = process.wait()
    finally:
        if data_dir is None:
            shutil.rmtree(directory, ignore_errors=True)
    sys.exit(0 if code in (0, -signal.SIGTERM, -signal.SIGINT) else 1)
