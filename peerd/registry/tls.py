"""Finds out what is wrong with TLS between this client and an etcd that has never answered.

gRPC does not report it: it says "socket closed", "tsi_data_corrupted" or even "ok", depending on its version
and on timing. So Python's own ssl connects once to the same address, for its error text. This is done only
if no call has ever succeeded, because a configuration that worked before is not wrong.
"""

from __future__ import annotations

import socket
import ssl
from pathlib import Path

from peerd.address import Address

CONNECT_TIMEOUT_S = 1.0

# The client's preface of HTTP/2 and empty SETTINGS (RFC 9113, 3.4), which every HTTP/2 server answers.
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])


def why_https_fails(
    member: Address, ca_file: Path | None, cert_file: Path | None, key_file: Path | None
) -> str:
    """What to change; empty if TLS is not the cause, or nothing listens there."""
    context = ssl.create_default_context(cafile=ca_file)
    if cert_file is not None:
        try:
            context.load_cert_chain(cert_file, key_file)
        except ssl.SSLError:
            return f"{cert_file} and {key_file} do not match: correct --etcd-cert and --etcd-key"
    context.set_alpn_protocols(["h2"])
    try:
        with socket.create_connection(member, CONNECT_TIMEOUT_S) as plain:
            return _of_handshake(context, plain, member, cert_file)
    except OSError:
        return ""


def _of_handshake(
    context: ssl.SSLContext, plain: socket.socket, member: Address, cert_file: Path | None
) -> str:
    refused = "etcd wants a certificate of ours: give --etcd-cert and --etcd-key"
    if cert_file is not None:
        refused = f"etcd does not trust our certificate {cert_file}: give another --etcd-cert"
    try:
        secure = context.wrap_socket(plain, server_hostname=member.host)
    except ssl.SSLCertVerificationError as error:
        return f"its certificate is not trusted: {error.verify_message}; name who signed it with --etcd-ca"
    except (ssl.SSLError, ConnectionError) as error:
        # Up to TLS 1.2, our certificate is refused by an alert within the handshake.
        if "ALERT" in str(getattr(error, "reason", "")):
            return refused
        return f"it does not speak TLS there: write http://{member}"
    with secure:
        try:
            # With TLS 1.3, etcd checks our certificate after the handshake is complete on our side.
            secure.sendall(_HELLO)
            return "" if secure.recv(1) else refused
        except TimeoutError:
            return ""
        except (ssl.SSLError, ConnectionError):
            return refused


def why_http_fails(member: Address) -> str:
    """The same for plain text: whether the server speaks TLS."""
    try:
        if not _answers_plainly(member) and _speaks_tls(member):
            return f"it speaks TLS there: write https://{member}"
    except OSError:
        pass
    return ""


def _answers_plainly(member: Address) -> bool:
    with socket.create_connection(member, CONNECT_TIMEOUT_S) as plain:
        try:
            plain.sendall(_HELLO)
            return bool(plain.recv(1))
        except ConnectionError:
            return False


def _speaks_tls(member: Address) -> bool:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection(member, CONNECT_TIMEOUT_S) as plain:
        try:
            context.wrap_socket(plain).close()
        except ssl.SSLError as error:
            return "ALERT" in str(error.reason)
        except ConnectionError:
            return False
    return True
