"""Certificates for tests, from the ``openssl`` command line."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import NamedTuple

_KEY = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]

# Instead of the system's configuration, which adds extensions. etcd's gateway is a client of its own server
# and uses the server's certificate, so each certificate is valid for both roles.
_CONFIG = """\
[req]
distinguished_name = name
[name]
[authority]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign, cRLSign
[leaf]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth, clientAuth
subjectAltName = DNS:localhost, IP:127.0.0.1, IP:::1
"""


class Certificate(NamedTuple):
    cert_file: Path
    key_file: Path


class CertificateAuthority:
    """Signs certificates for localhost. Two of them do not trust each other."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        self._folder = folder / name
        self._folder.mkdir()
        self._config = self._folder / "openssl.cnf"
        self._config.write_text(_CONFIG)
        self._own = self._make(name, ["-extensions", "authority"])

    @property
    def ca_file(self) -> Path:
        return self._own.cert_file

    def issue(self, name: str) -> Certificate:
        """``name`` is also the common name, which etcd uses as the user's name."""
        signer = ["-CA", str(self._own.cert_file), "-CAkey", str(self._own.key_file)]
        return self._make(name, ["-extensions", "leaf", *signer])

    def _make(self, name: str, how: list[str]) -> Certificate:
        made = Certificate(self._folder / f"{name}.pem", self._folder / f"{name}.key")
        command = ["openssl", "req", "-x509", "-config", str(self._config), "-days", "2"]
        command += ["-subj", f"/CN={name}", *_KEY, *how]
        command += ["-out", str(made.cert_file), "-keyout", str(made.key_file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return made
