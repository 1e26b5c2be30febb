"""A web server and a small hub on this machine, with faults that a test asks for.

The hub has the few routes that huggingface_hub calls to list, download and upload a model.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class Repo:
    """A model: a commit and its files by name."""

    commit: str
    files: dict[str, bytes]


@dataclass
class Fake:
    """What the server has, what goes wrong, and what was asked.

    Attributes:
        files: by path, `/a/b`.
        repos: by `org/name@revision`.
        cut: bytes after which the connection is cut, by path; one for each answer to come.
        status: codes to answer with instead, by path; one for each answer to come.
        passwords: header Authorization that a path needs.
        redirects: where a path sends on to.
        unlisted: hide lengths, by path.
        slow: seconds before each block.
        log: (method, path, headers) of each request.
        pushed: bodies of uploads, by route.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    repos: dict[str, Repo] = field(default_factory=dict)
    cut: dict[str, list[int]] = field(default_factory=dict)
    status: dict[str, list[int]] = field(default_factory=dict)
    passwords: dict[str, str] = field(default_factory=dict)
    redirects: dict[str, str] = field(default_factory=dict)
    unlisted: set[str] = field(default_factory=set)
    slow: float = 0.0
    log: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    pushed: dict[str, Any] = field(default_factory=dict)
    server: ThreadingHTTPServer | None = None

    def start(self, port: int = 0) -> Fake:
        handler = type("Handler", (_Handler,), {"fake": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def stop(self) -> None:
        if self.server is not None:
            self.server.shutdown()
            self.server.server_close()
            self.server = None

    @property
    def url(self) -> str:
        assert self.server is not None
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def put(self, folder: str, files: dict[str, bytes]) -> str:
        """Files below a path of the web server; returns the URL of the folder."""
        self.files |= {f"{folder}/{name}": data for name, data in files.items()}
        return f"{self.url}{folder}"

    def asked(self, method: str = "GET", end: str = "") -> list[dict[str, str]]:
        """Headers of the requests for a path that ends so."""
        return [h for m, path, h in list(self.log) if m == method and path.endswith(end)]


class _Handler(BaseHTTPRequestHandler):
    fake: Fake
    protocol_version = "HTTP/1.1"

    def log_message(self, *words: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        fake = self.fake
        if fake.server is None:  # stopped, and a client kept its connection
            self.close_connection = True
            return
        fake.log.append((self.command, path, dict(self.headers)))
        if fake.status.get(path):
            return self._say(fake.status[path].pop(0), b"planted fault")
        if path in fake.passwords and self.headers.get("Authorization") != fake.passwords[path]:
            return self._say(401, b"who are you?")
        if path in fake.redirects:
            return self._say(302, b"", {"Location": fake.redirects[path]})
        if path.startswith("/api/models/") and "/revision/" in path:
            repo, _, revision = path.removeprefix("/api/models/").partition("/revision/")
            return self._facts(repo, revision, "blobs" in parse_qs(parts.query))
        if "/resolve/" in path:
            repo, _, rest = path[1:].partition("/resolve/")
            revision, _, name = rest.partition("/")
            found = self._repo(repo, revision)
            if found is None or name not in found.files:
                return self._say(404, b"", {"X-Error-Code": "EntryNotFound"})
            return self._bytes(path, found.files[name], body, {"X-Repo-Commit": found.commit})
        if path not in fake.files:
            return self._say(404, b"nothing here")
        self._bytes(path, fake.files[path], body, {})

    def _repo(self, repo: str, revision: str) -> Repo | None:
        for name, one in self.fake.repos.items():
            if name.startswith(f"{repo}@") and revision in (name.partition("@")[2], one.commit):
                return one
        return None

    def _facts(self, repo: str, revision: str, blobs: bool) -> None:
        found = self._repo(repo, revision)
        if found is None:
            known = any(name.startswith(f"{repo}@") for name in self.fake.repos)
            code = "RevisionNotFound" if known else "RepoNotFound"
            return self._say(404, b"{}", {"X-Error-Code": code})
        listed = []
        for name, data in found.files.items():
            one: dict[str, Any] = {"rfilename": name}
            if blobs:
                one["size"] = len(data)
                if name.endswith((".safetensors", ".pth")):
                    sha256 = hashlib.sha256(data).hexdigest()
                    one["lfs"] = {"size": len(data), "sha256": sha256, "pointerSize": 134}
            listed.append(one)
        facts = {"id": repo, "sha": found.commit, "siblings": listed, "tags": [], "private": False}
        self._say(200, json.dumps(facts).encode(), {"Content-Type": "application/json"})

    def _bytes(self, path: str, data: bytes, body: bool, more: dict[str, str]) -> None:
        tag = f'"{hashlib.md5(data).hexdigest()}"'
        start, code = 0, 200
        asked = self.headers.get("Range", "")
        if asked.startswith("bytes=") and self.headers.get("If-Range", tag) == tag:
            start = int(asked[6:].partition("-")[0])
            if start >= len(data):
                return self._say(416, b"")
            code = 206
            more = more | {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
        if path not in self.fake.unlisted:
            more = more | {"Content-Length": str(len(data) - start)}
        self.send_response(code)
        for name, value in {"ETag": tag, **more}.items():
            self.send_header(name, value)
        if path in self.fake.unlisted:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        if not body:
            return
        end = len(data)
        if self.fake.cut.get(path):
            end = min(end, start + self.fake.cut[path].pop(0))
            self.close_connection = True
        for begin in range(start, end, 65536):
            time.sleep(self.fake.slow)
            with contextlib.suppress(ConnectionError):  # whoever asked has heard enough
                self.wfile.write(data[begin : min(begin + 65536, end)])
                self.wfile.flush()

    def _say(self, code: int, text: bytes, more: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(text)), **(more or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self._body()
        self.fake.log.append(("POST", path, dict(self.headers)))
        self.fake.pushed[path] = body
        if self.fake.status.get(path):
            return self._say(self.fake.status[path].pop(0), b"{}")
        answer: dict[str, Any] = {}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if any(one.startswith(f"{name}@") for one in self.fake.repos):
                return self._json({"error": "there", "url": f"{self.fake.url}/{name}"}, 409)
            self.fake.repos[f"{name}@main"] = Repo("0" * 40, {})
            answer = {"url": f"{self.fake.url}/{name}", "name": name}
        elif "/preupload/" in path:
            asked = json.loads(body)
            answer = {
                "files": [
                    {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for one in asked["files"]
                ]
            }
        elif "/commit/" in path:
            repo, _, branch = path.removeprefix("/api/models/").partition("/commit/")
            lines = [json.loads(line) for line in body.decode().splitlines() if line]
            files = {
                one["value"]["path"]: base64.b64decode(one["value"]["content"])
                for one in lines
                if one["key"] == "file"
            }
            commit = hashlib.sha1(body).hexdigest()
            self.fake.repos[f"{repo}@{branch}"] = Repo(commit, files)
            url = f"{self.fake.url}/{repo}/commit/{commit}"
            answer = {"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""}
        elif path == "/api/validate-yaml":
            answer = {"errors": [], "warnings": []}
        else:
            return self._say(404, b"{}")
        self._json(answer)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        found = b""
        while size := int(self.rfile.readline().strip() or b"0", 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def _json(self, answer: Any, code: int = 200) -> None:
        self._say(code, json.dumps(answer).encode(), {"Content-Type": "application/json"})
