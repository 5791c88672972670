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
    help="Client port, on loopback.",
)
@click.option(
    "--data-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Keep the data here. Without it, data is thrown away at the end.",
)
def etcd(port: int, data_dir: Path | None) -> None:
    """Run a single etcd on loopback, in the foreground: the one that 'peerd supervise' would start.

    For trials and tests. In production, run a real etcd cluster and name it with --etcd.
    """
    binary = find_etcd()
    if binary is None:
        raise RegistryUnavailableError(HOW_TO_GET_ETCD)
    url = f"http://127.0.0.1:{port}"
    if is_listening(url):
        raise BindError(f"somebody listens on TCP port {port} already: choose another with --port")
    directory = data_dir or Path(tempfile.mkdtemp(prefix="peerd-etcd-"))
    kept = "" if data_dir else ", data thrown away at the end"
    name = (
        "this is where peerd looks by default"
        if f":{port}" in DEFAULT_ENDPOINT
        else f"use --etcd {url}"
    )
    click.echo(f"etcd at {url} ({binary}{kept}); {name}; Ctrl-C stops it", err=True)
    try:
        process = subprocess.Popen(command(binary, url, directory, durable=data_dir is not None))
        for number in (signal.SIGTERM, signal.SIGINT):
            # The terminal sends Ctrl-C to etcd as well; a signal to this process alone is passed on.
            signal.signal(number, lambda number, _: process.send_signal(number))
        code = process.wait()
    finally:
        if data_dir is None:
            shutil.rmtree(directory, ignore_errors=True)
    sys.exit(0 if code in (0, -signal.SIGTERM, -signal.SIGINT) else 1)
