"""How the loopback Hub reads requests and writes answers, with the faults a test asks for."""

from __future__ import annotations

import json
import re
import socket
import struct
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

if TYPE_CHECKING:
    from tests.hub.loopback.server import Fault, LoopbackHub

Answer = Callable[[], None]
"""Writes an answer, when the Hub's lock is free again."""


class Refusal(Exception):
    """An answer other than success: status, the Hub's error code, and what it says."""

    def __init__(self, status: int, code: str | None = None, message: str = "") -> None:
        self.status, self.message = status, message or code or "refused"
        self.headers = {"X-Error-Message": self.message, **({"X-Error-Code": code} if code else {})}


class Cut(Exception):
    """The connection is to break off here."""


class Transport(BaseHTTPRequestHandler):
    """What every request needs: its body read, its fault met, its line recorded, its answer written."""

    routes: ClassVar[list[tuple[str, Callable[..., Answer]]]] = []
    """Patterns for "METHOD /path" as the client wrote it, and the methods that get their named groups, unquoted."""
    protocol_version = "HTTP/1.1"
    # Answers are small and come in two writes, headers and content: without this each waits for an acknowledgement.
    disable_nagle_algorithm = True

    @property
    def hub(self) -> LoopbackHub:
        return self.server.hub  # type: ignore[attr-defined]

    def log_message(self, *_: Any) -> None:
        """Nothing goes to stderr; `LoopbackHub.requests` is the log."""

    def do_HEAD(self) -> None:
        url = urlsplit(self.path)
        self.query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        self.line = unquote(f"{self.command} {self.path}")
        self.received = 0
        self.fault: Fault | None = self.hub.next_fault(self.line)
        try:
            try:
                self.body = self._read_body()
                self._answer(f"{self.command} {url.path}")()
            except Refusal as refusal:
                extra = {} if self.fault is None else self.fault.headers
                self.json({"error": refusal.message}, refusal.status, {**refusal.headers, **extra})()
        except (Cut, ConnectionError):
            self._cut()

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD

    def _answer(self, target: str) -> Answer:
        if self.fault is not None and self.fault.status is not None:
            raise Refusal(self.fault.status, None, "so the test wants it")
        for pattern, method in self.routes:
            if match := re.fullmatch(pattern, target):
                groups = {name: unquote(text) for name, text in match.groupdict().items() if text is not None}
                with self.hub.lock:
                    return method(self, **groups)
        raise Refusal(404, None, f"the loopback Hub does not know {self.line}")

    def _read_body(self) -> bytes:
        limit = None if self.fault is None else self.fault.cut_upload
        parts = []
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self._receive(size, limit))
                self.rfile.readline()
            self.rfile.readline()
        else:
            parts.append(self._receive(int(self.headers.get("Content-Length", 0)), limit))
        return b"".join(parts)

    def _receive(self, size: int, limit: int | None) -> bytes:
        wanted = size if limit is None else min(size, limit - self.received)
        data = self.rfile.read(wanted)
        self.received += len(data)
        if len(data) < size:
            self._record(0)
            raise Cut
        return data

    def _record(self, status: int) -> None:
        """Before the answer goes out, so that who has it finds the request in the log."""
        headers = {name.lower(): text for name, text in self.headers.items()}
        self.hub.record(self.line, headers, self.received, status)

    def _cut(self) -> None:
        self.close_connection = True
        if self.fault is not None and self.fault.cut_upload is not None:
            # What the client goes on sending is answered by a reset, as when a network fails.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def json(self, value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
        return self.data(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def data(self, content: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
        def write() -> None:
            self._record(status)
            self.send_response(status)
            for name, text in {"Content-Length": str(len(content)), **(headers or {})}.items():
                self.send_header(name, text)
            self.end_headers()
            if self.command == "HEAD":
                return
            limit = None if self.fault is None else self.fault.cut_download
            self.wfile.write(content[:limit])
            if limit is not None and limit < len(content):
                raise Cut

        return write
