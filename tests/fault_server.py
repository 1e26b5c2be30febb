"""A web server on this machine with faults drawn from a seed: of a folder, or before another."""

from __future__ import annotations

import contextlib
import random
import re
import ssl
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class FaultServer:
    """Serves a folder; a context.

    Attributes:
        folder: what it serves.
        seed: of the faults.
        busy: share of requests that are answered with 503.
        cut: share whose body ends early.
        slow: share that wait for `pause` seconds.
        pause: of these, in seconds.
        ranges: whether it knows them.
        password: header Authorization that it needs.
        changed: bytes to send instead of files, by name.
        tag: ETag of what it sends; empty: none. Of a range that is asked for with another one, all
            comes.
        wrong: by name, bytes that a header says a body has more than it has, or fewer.
        redirects: where to go instead, by name.
        secure: file of a key and a certificate; empty: it speaks no TLS.
        behind: host and port of a server whose answers it passes on, instead of files.
        sent: bytes of bodies, by name.
        asked: requests, by name.
        faults: how often each fault came.
        most: requests for bodies that were under way at once.
    """

    folder: Path
    seed: int = 0
    busy: float = 0.0
    cut: float = 0.0
    slow: float = 0.0
    pause: float = 0.2
    ranges: bool = True
    password: str = ""
    changed: dict[str, bytes] = field(default_factory=dict)
    tag: str = ""
    wrong: dict[str, int] = field(default_factory=dict)
    redirects: dict[str, str] = field(default_factory=dict)
    secure: str = ""
    behind: str = ""
    sent: Counter[str] = field(default_factory=Counter)
    asked: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    most: int = 0
    _now: int = 0

    def __enter__(self) -> FaultServer:
        self._rng, self._lock = random.Random(self.seed), threading.Lock()
        handler = type("Handler", (_Handler,), {"server_of": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        if self.secure:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.secure)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        return f"http{'s' if self.secure else ''}://127.0.0.1:{self.port}"

    def draw(self) -> str:
        """Which fault the next answer has, if any."""
        with self._lock:
            chance = self._rng.random()
            for name in ("busy", "cut", "slow"):
                chance -= getattr(self, name)
                if chance < 0:
                    self.faults[name] += 1
                    return name
        return ""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_of: FaultServer

    def do_GET(self) -> None:
        mine, name = self.server_of, self.path.split("?")[0].lstrip("/")
        with mine._lock:
            mine.asked[name] += 1
        if mine.password and self.headers.get("Authorization") != mine.password:
            return self._refuse(401)
        fault = mine.draw()
        if fault == "busy":
            return self._refuse(503)
        with mine._lock:
            mine._now += 1
            mine.most = max(mine.most, mine._now)
        try:
            if fault == "slow":
                time.sleep(mine.pause)
            (self._relay if mine.behind else self._answer)(mine, name, fault)
        finally:
            with mine._lock:
                mine._now -= 1
        return None

    def do_HEAD(self) -> None:
        if self.server_of.behind:
            return self.do_GET()
        return self._refuse(501)

    def _relay(self, mine: FaultServer, name: str, fault: str) -> None:
        asked = HTTPConnection(mine.behind, timeout=60)
        with contextlib.closing(asked):
            asked.request(self.command, self.path, headers=dict(self.headers.items()))
            answer = asked.getresponse()
            data = answer.read()
        self.send_response(answer.status)
        hops = ("connection", "transfer-encoding", "server", "date", "content-length")
        for key, value in answer.getheaders():
            if key.lower() not in hops:
                self.send_header(key, value)
        self.send_header("Content-Length", answer.getheader("Content-Length", str(len(data))))
        self._finish(mine, name, data, fault)

    def _answer(self, mine: FaultServer, name: str, fault: str) -> None:
        file = mine.folder / name
        if name in mine.redirects:
            self._refuse(302, mine.redirects[name])
            return
        if name not in mine.changed and not file.is_file():
            self._refuse(404)
            return
        content = mine.changed.get(name)
        size = file.stat().st_size if content is None else len(content)
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first, last = 0, size - 1
        if span and int(span[1]) >= size:
            self._refuse(416)
            return
        if span and mine.ranges and self.headers.get("If-Range", mine.tag) == mine.tag:
            first, last = int(span[1]), min(int(span[2] or size), size - 1)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        else:
            self.send_response(200)
        if content is None:
            with file.open("rb") as opened:
                opened.seek(first)
                data = opened.read(last + 1 - first)
        else:
            data = content[first : last + 1]
        self.send_header("Content-Length", str(len(data) + mine.wrong.get(name, 0)))
        if mine.tag:
            self.send_header("ETag", mine.tag)
        self._finish(mine, name, data, fault)

    def _finish(self, mine: FaultServer, name: str, data: bytes, fault: str) -> None:
        self.end_headers()
        if fault == "cut":
            data = data[: len(data) // 2]
            self.close_connection = True
        with mine._lock:  # before the client can know of them
            mine.sent[name] += len(data)
        if mine.wrong.get(name, 0):
            self.close_connection = True
        with contextlib.suppress(ConnectionError):  # the client has seen enough
            self.wfile.write(data)

    def _refuse(self, code: int, to: str = "") -> None:
        self.send_response(code)
        if to:
            self.send_header("Location", to)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""
