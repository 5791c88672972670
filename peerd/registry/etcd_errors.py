"""gRPC's errors in our own types, with words that name the cause and the next step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc

from peerd.address import Address
from peerd.errors import (
    RegistryAuthError,
    RegistryError,
    RegistryUnavailableError,
    SettingsError,
)
from peerd.settings import DEFAULT_ENDPOINT, EtcdAccess


class LeaseNotFoundError(RegistryError):
    """The lease to put a key under has expired or was revoked."""


class CompactedError(RegistryError):
    """The requested revision is not in the store: too old, or of another store."""


class TooLargeError(RegistryError):
    """The answer is larger than what is accepted: request fewer keys."""


class LoginEndedError(RegistryUnavailableError):
    """The token is not valid any more: log in again."""


def of_rpc(
    error: Any,
    urls: str,
    member: Address,
    access: EtcdAccess,
    timeout_s: float,
    *,
    uses_tls: bool,
    has_ever_answered: bool,
) -> RegistryError:
    """The error to raise for a ``grpc.RpcError`` of a call to ``member``."""
    code, details = error.code(), error.details() or ""
    status = grpc.StatusCode
    if code is status.NOT_FOUND:
        return LeaseNotFoundError(f"etcd at {urls}: {details}")
    if code is status.OUT_OF_RANGE:
        return CompactedError(f"etcd at {urls}: {details}")
    # Not "frame size ... is larger than max", which is what a network that garbles bytes leads to.
    if code is status.RESOURCE_EXHAUSTED and "message larger than max" in details:
        return TooLargeError(f"etcd at {urls}: {details}")
    if refusal := _auth_refusal(code, details, urls, access):
        return refusal
    if code in (status.INVALID_ARGUMENT, status.FAILED_PRECONDITION, status.RESOURCE_EXHAUSTED):
        return RegistryError(f"etcd at {urls} refuses the request: {details}")
    if code is status.DEADLINE_EXCEEDED:
        cause = f"no answer within {timeout_s:.2g} s"
    elif not has_ever_answered and (trouble := _tls_trouble(member, access, uses_tls)):
        return RegistryUnavailableError(f"etcd at {urls} cannot be asked: {trouble}")
    else:
        # gRPC gives the whole chain of causes: "...: last error: UNKNOWN: ...: Connection refused (111)".
        cause = details.rpartition(": ")[2].rstrip("]").lower() or code.name.lower()
    start = "start it with 'peerd etcd'" if urls == DEFAULT_ENDPOINT else "see that it runs"
    return RegistryUnavailableError(
        f"etcd at {urls} does not answer ({cause}): {start}, or name another with --etcd"
    )


def _auth_refusal(code: Any, details: str, urls: str, access: EtcdAccess) -> RegistryError | None:
    if "invalid auth token" in details or "revision in header is old" in details:
        return LoginEndedError(f"etcd at {urls}: {details}")
    # With authentication on, etcd calls a request without a token an invalid argument.
    if "user name is empty" in details:
        if access.user is not None:  # authentication has just been switched on
            return LoginEndedError(f"etcd at {urls}: {details}")
        return RegistryAuthError(
            f"etcd at {urls} wants a login: give --etcd-user, and --etcd-password-file or "
            "PEERD_ETCD_PASSWORD"
        )
    if "authentication failed" in details:
        return RegistryAuthError(
            f"etcd at {urls} refuses user {access.user!r} with this password: correct "
            "--etcd-user, --etcd-password-file or PEERD_ETCD_PASSWORD"
        )
    if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
        who = "without a login" if access.user is None else f"user {access.user!r}"
        return RegistryAuthError(
            f"etcd at {urls} refuses {who} ({details}): the role needs read and write "
            "permission for the prefix"
        )
    return None


def _tls_trouble(member: Address, access: EtcdAccess, uses_tls: bool) -> str:
    from peerd.registry.tls import why_http_fails, why_https_fails

    if not uses_tls:
        return why_http_fails(member)
    ca_file = access.ca_file or trusted_authorities()
    return why_https_fails(member, ca_file, access.cert_file, access.key_file)


def trusted_authorities() -> Path:
    """The file of this machine's certificate authorities. Raises SettingsError if there is none."""
    import ssl  # only for https, because OpenSSL takes megabytes

    paths = ssl.get_default_verify_paths()
    for found in (paths.cafile, "/etc/ssl/certs/ca-certificates.crt"):
        if found is not None and Path(found).is_file():
            return Path(found)
    raise SettingsError("this machine trusts no authority: name etcd's with --etcd-ca")
