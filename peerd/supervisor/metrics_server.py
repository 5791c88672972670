"""``--metrics``: the metrics and two health checks over HTTP, from within the supervisor's selector.

    /metrics        the metrics (metrics.py)
    /healthz/live   200 while the supervisor's loop runs; a blocked loop does not answer
    /healthz/ready  200 when every peer is ready and healthy, else 503 and one line with those that are not

A connection carries one GET. BoundedServer bounds what clients cost. A rendered page is reused for ten times
as long as rendering took: however many clients scrape, that takes at most a tenth of the supervisor's time.
"""

from __future__ import annotations

import logging
import re
import socket
import time
from collections.abc import Callable, Mapping
from http import HTTPStatus

from peerd.supervisor import exposition
from peerd.supervisor.bounded_server import BoundedServer, Reply, ServerProtocol
from peerd.supervisor.loop import Loop
from peerd.supervisor.metrics import Metrics
from peerd.supervisor.status import StatusReport

log = logging.getLogger(__name__)

MAX_REQUEST_BYTES = 8 * 1024
MAX_CLIENTS = 32
CLIENT_TIMEOUT_S = 5.0

REUSE_FACTOR = 10  # A page is reused for ten times as long as rendering it took
PLAIN_TEXT = "text/plain; charset=utf-8"

END_OF_HEADERS = re.compile(rb"\r?\n\r?\n")

Response = tuple[bytes, bytes]  # Headers and body; apart, so that clients share one copy of a page


class MetricsServer:
    def __init__(
        self, listener: socket.socket, metrics: Metrics, status: StatusReport, loop: Loop
    ) -> None:
        """``listener`` must not block; the server owns it from here on."""
        self._metrics = metrics
        self._status = status
        self._page = b""
        self._page_until_s = 0.0
        self._pages: Mapping[bytes, Callable[[], Response]] = {
            b"/metrics": self._metrics_page,
            b"/healthz/live": lambda: _response(HTTPStatus.OK, b"live\n"),
            b"/healthz/ready": self._ready_page,
        }
        self._server = BoundedServer(
            loop,
            listener,
            ServerProtocol(
                max_clients=MAX_CLIENTS,
                max_request_bytes=MAX_REQUEST_BYTES,
                client_timeout_s=CLIENT_TIMEOUT_S,
                split=_split,
                answer=self._answer,
                is_closed_after_answer=True,
            ),
        )

    def close(self) -> None:
        self._server.close()

    def _answer(self, request: bytes, reply: Reply) -> None:
        try:
            reply(self._response_to(request))
        except Exception:  # a failing scrape must not end the service
            log.exception("a request for the metrics failed")
            reply(_response(HTTPStatus.INTERNAL_SERVER_ERROR, b"see the supervisor's log\n"))

    def _response_to(self, request: bytes) -> Response:
        words = request.splitlines()[0].split()
        if len(words) != 3 or not words[2].startswith(b"HTTP/1."):
            return _response(HTTPStatus.BAD_REQUEST, b"this server speaks HTTP/1.1\n")
        if words[0] != b"GET":
            return _response(
                HTTPStatus.METHOD_NOT_ALLOWED, b"the only method is GET\n", "Allow: GET"
            )
        page = self._pages.get(words[1].partition(b"?")[0])
        if page is None:
            known = b", ".join(self._pages)
            return _response(HTTPStatus.NOT_FOUND, b"the pages are " + known + b"\n")
        return page()

    def _metrics_page(self) -> Response:
        started_s = time.monotonic()
        if started_s >= self._page_until_s:
            self._page = exposition.render(self._metrics.families())
            ended_s = time.monotonic()
            self._page_until_s = ended_s + REUSE_FACTOR * (ended_s - started_s)
        return _response(HTTPStatus.OK, self._page, f"Content-Type: {exposition.CONTENT_TYPE}")

    def _ready_page(self) -> Response:
        status = HTTPStatus.OK if self._status.all_healthy else HTTPStatus.SERVICE_UNAVAILABLE
        return _response(status, f"{self._status.summary()}\n".encode("utf-8", "replace"))


def _split(received: bytes) -> tuple[bytes, bytes] | None:
    found = END_OF_HEADERS.search(received)
    return (received[: found.start()] + b"\n", received[found.end() :]) if found else None


def _response(status: HTTPStatus, body: bytes, *headers: str) -> Response:
    """Plain text, unless a header says otherwise."""
    if not any(header.startswith("Content-Type:") for header in headers):
        headers = (f"Content-Type: {PLAIN_TEXT}", *headers)
    first, length = f"HTTP/1.1 {status.value} {status.phrase}", f"Content-Length: {len(body)}"
    lines = (first, *headers, length, "Cache-Control: no-store", "Connection: close", "")
    return "".join(f"{line}\r\n" for line in lines).encode(), body
