"""A client for etcd that bypasses the registry and gRPC: its JSON gateway over plain HTTP.

Tests use it to write what the registry must see, to read what the registry must have written, and for what
only an administrator does: compaction, users, a move of the leader.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from peerd.address import Address

ALL_KEYS = b"\0"


class GatewayError(Exception):
    """etcd refused."""


class Item(NamedTuple):
    value: bytes
    lease_id: int
    create_revision: int  # it changes when a key is deleted and created again
    mod_revision: int


class Change(NamedTuple):
    revision: int
    key: bytes
    value: bytes | None  # None: deleted


class Status(NamedTuple):
    member_id: int
    leader_id: int  # 0: none known
    revision: int


class Gateway:
    """Opens a connection per call. Raises OSError if no server answers within ``timeout_s``."""

    def __init__(
        self, address: Address, user: str = "", password: str = "", timeout_s: float = 5.0
    ) -> None:
        self.address = address
        self.timeout_s = timeout_s
        self._user = user
        self._password = password

    # Keys

    def put(self, key: bytes, value: bytes) -> int:
        """Returns the revision of the store after it."""
        return _revision(self._post("kv/put", key=_base64(key), value=_base64(value)))

    def delete(self, key: bytes) -> int:
        return _revision(self._post("kv/deleterange", key=_base64(key)))

    def items(self, prefix: bytes, *, serializable: bool = False) -> dict[bytes, Item]:
        """``serializable``: this member's own state, whether or not it is still part of a majority."""
        answer = self._post("kv/range", **_below(prefix), serializable=serializable)
        return {
            base64.b64decode(item["key"]): Item(
                base64.b64decode(item.get("value", "")),
                int(item.get("lease", 0)),
                int(item["create_revision"]),
                int(item["mod_revision"]),
            )
            for item in answer.get("kvs", [])
        }

    def revision(self) -> int:
        return _revision(self._post("kv/range", key=_base64(ALL_KEYS), count_only=True))

    def history(self, prefix: bytes) -> list[Change]:
        """All changes below ``prefix`` so far, for a store that was never compacted."""
        # A mark at the end, because a watch does not report that it has reached the present.
        mark = self.put(b"\xffhistory", b"")
        changes: list[Change] = []
        everything = {**_below(b""), "start_revision": 1}
        with self._answer("watch", {"create_request": everything}, self._token()) as lines:
            for line in map(json.loads, lines):
                for event in line["result"].get("events", []):
                    item = event["kv"]
                    key, revision = base64.b64decode(item["key"]), int(item["mod_revision"])
                    if revision == mark:
                        return changes
                    if key.startswith(prefix):
                        deleted = event.get("type") == "DELETE"
                        value = None if deleted else base64.b64decode(item.get("value", ""))
                        changes.append(Change(revision, key, value))
        raise GatewayError("the watch ended before it reached the present")

    def compact(self, revision: int) -> None:
        """Discards all older revisions; returns once they are removed from the disk, too."""
        self._post("kv/compaction", revision=revision, physical=True)

    # The cluster

    def status(self) -> Status:
        """This member's own view."""
        answer = self._post("maintenance/status")
        header = answer["header"]
        return Status(
            int(header["member_id"]), int(answer.get("leader", 0)), int(header.get("revision", 0))
        )

    def move_leader(self, member_id: int) -> None:
        """This member must be the leader."""
        self._post("maintenance/transfer-leadership", targetID=str(member_id))

    def metrics(self) -> str:
        """This member's page of metrics."""
        with contextlib.closing(self._connection()) as connection:
            connection.request("GET", "/metrics")
            return connection.getresponse().read().decode()

    # Authentication

    def enable_auth(self, root_password: str) -> None:
        """Require a login from now on; this gateway becomes ``root``."""
        self.add_user("root", root_password)
        self._post("auth/role/add", name="root")
        self._post("auth/user/grant", user="root", role="root")
        self._post("auth/enable")
        self._user, self._password = "root", root_password

    def add_user(self, name: str, password: str) -> None:
        self._post("auth/user/add", name=name, password=password)

    def allow(self, user: str, prefix: bytes) -> None:
        """Lets ``user`` read and write below ``prefix``."""
        role = f"role-of-{user}"
        self._post("auth/role/add", name=role)
        permission = {"permType": "READWRITE", **_below(prefix)}
        self._post("auth/role/grant", name=role, perm=permission)
        self._post("auth/user/grant", user=user, role=role)

    # HTTP

    def _post(self, path: str, **body: object) -> Any:
        with self._answer(path, body, self._token()) as answer:
            return json.loads(answer.read())

    def _token(self) -> str:
        """A new token for each call, because tokens may be short-lived."""
        if not self._user:
            return ""
        credentials = {"name": self._user, "password": self._password}
        with self._answer("auth/authenticate", credentials, "") as answer:
            token: str = json.loads(answer.read())["token"]
            return token

    def _connection(self) -> http.client.HTTPConnection:
        # Not urllib, which would use a proxy of the environment.
        return http.client.HTTPConnection(*self.address, timeout=self.timeout_s)

    @contextlib.contextmanager
    def _answer(self, path: str, body: object, token: str) -> Iterator[http.client.HTTPResponse]:
        connection = self._connection()
        try:
            headers = {"Authorization": token} if token else {}
            connection.request("POST", f"/v3/{path}", json.dumps(body), headers)
            with connection.getresponse() as answer:
                if answer.status != http.HTTPStatus.OK:
                    raise GatewayError(f"{path}: {answer.status} {answer.read().decode()}")
                yield answer
        except http.client.HTTPException as error:
            raise ConnectionError(f"{path}: {error!r}") from None
        finally:
            connection.close()


def _below(prefix: bytes) -> dict[str, object]:
    """The range of all keys with the prefix, which must not end in 0xff; empty: all keys."""
    end = prefix[:-1] + bytes([prefix[-1] + 1]) if prefix else ALL_KEYS
    return {"key": _base64(prefix or ALL_KEYS), "range_end": _base64(end)}


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _revision(answer: Any) -> int:
    return int(answer["header"]["revision"])
