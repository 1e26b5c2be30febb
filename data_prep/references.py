"""What names a checkpoint that is not on this machine: hf://, https:// and s3:// references.

A reference may hold a password or a signature. What is printed, logged and stored is `shown`.
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Literal
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit, urlunsplit

from data_prep.errors import InputError

WEIGHTS = (".safetensors", ".pth", ".pt", ".ckpt", ".bin", ".model")
"""Ends of the names of single files of weights; anything else is the folder of a release."""

ARCHIVES = (".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".rar")

_SCHEME = re.compile(r"(hf|https?|s3):/+(.*)", re.DOTALL)
_HUB = re.compile(
    r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>refs/(?:pr|convert)/[\w.-]+|[\w.-]+))?"
    r"(?:/(?P<path>.*))?"
)
_SIGNATURE = re.compile(
    r"x-(amz|goog)-.*|(aws|google)access(key)?id|signature|expires|policy|key-pair-id|"
    r"(access_?)?token|api_?key|sig|s[eprstv]|srt|spr|sip|sk(oid|tid|t|e|s|v)",
    re.IGNORECASE,
)
"""Parts of a query that are signed anew each time and do not tell what is fetched."""

_NEXT = r"(?!,\s*[a-z][a-z0-9+.-]+:/)"
_ADDRESS = re.compile(
    # Addresses of the hub have neither users nor queries, and an @ before the revision.
    r"((?!hf:)[a-z][a-z0-9+.-]+:/+)"
    # A user alone ends at the first @; a password, which may hold any sign, at the last.
    rf"(?:[^/\s:@]*:(?!\d{{1,5}}(?:[/?#\s]|$))(?:{_NEXT}\S)*@|[^/?#\s@]*@)?"
    rf"([^?#\s,]*)(?:\?(?:{_NEXT}[^#\s])*)?",
    re.IGNORECASE,
)
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}


@dataclass(frozen=True)
class Reference:
    """A parsed reference.

    Attributes:
        kind: the hub, a web server or a bucket.
        shown: the reference without what is secret.
        identity: what it is pinned by: without secrets, but with what tells content apart.
        url: of the folder or file, to open it; it may be signed.
        headers: of requests to it; they may hold a password.
        repo: on the hub.
        revision: of it: a branch, a tag or a commit.
        path: within it: a file of weights, or the folder of a release; empty: the whole of it.
        sha256: that the content must have, if the reference says so.
    """

    kind: Literal["hub", "web", "bucket"]
    shown: str
    identity: str
    url: str = field(default="", repr=False)
    headers: dict[str, str] = field(default_factory=dict, repr=False)
    repo: str = ""
    revision: str = ""
    path: str = ""
    sha256: str | None = None

    @property
    def is_file(self) -> bool:
        """Whether it names a single file of weights, not a release."""
        return self.path.lower().endswith(WEIGHTS)

    def url_of(self, name: str) -> str:
        """The URL of a file in the folder, with what signs that; it may hold a password."""
        folder, question, query = self.url.partition("?")
        return f"{folder}/{name}{question}{query}"

    def shown_of(self, name: str) -> str:
        """The address of a file in the folder, without what is secret."""
        return f"{self.shown.rstrip('/')}/{name}"

    @property
    def name(self) -> str:
        """Of the file, safe as a file's name here."""
        return re.sub(r"[^A-Za-z0-9._-]+", "-", PurePosixPath(self.path).name).lstrip(".-")


def is_reference(text: str) -> bool:
    """Whether a text names something that is not on this machine."""
    return _SCHEME.fullmatch(text) is not None


def parse(text: str) -> Reference:
    """Reads a reference: `hf://ORG/REPO[@REVISION][/PATH]`, `https://...` or `s3://...`.

    `#sha256=HEX` at its end says what the content must be. One slash after the scheme is enough:
    a reference that went through `Path` has lost the other.

    Raises:
        InputError: it is none, or names what is not safe to fetch.
    """
    text, _, wanted = text.partition("#")
    found = _SCHEME.fullmatch(text)
    if found is None:
        raise InputError("no reference: expected hf://ORG/REPO, https://... or s3://BUCKET/...")
    scheme, rest = found[1], found[2]
    sha256 = _sha256(wanted)
    if scheme == "hf":
        return _hub(rest, sha256)
    return _bucket(rest, sha256) if scheme == "s3" else _web(f"{scheme}://{rest}", sha256)


def without_secrets(text: str) -> str:
    """A text without the passwords and queries of the addresses in it, fit to be kept or shown."""
    return _ADDRESS.sub(r"\1\2", text)


def is_safe(path: str) -> bool:
    """Whether a path from elsewhere stays below the folder that it is joined to."""
    parts = path.split("/")
    return "\\" not in path and "\0" not in path and not {"", ".", ".."} & set(parts)


def _sha256(fragment: str) -> str | None:
    if not fragment:
        return None
    found = re.fullmatch(r"sha256=([0-9a-fA-F]{64})", fragment)
    if found is None:
        raise InputError("what follows # in a reference is sha256= and 64 digits, and no other")
    return found[1].lower()


def _hub(rest: str, sha256: str | None) -> Reference:
    found = _HUB.fullmatch(rest)
    path = (found["path"] or "").rstrip("/") if found else ""
    if found is None or (path and not is_safe(path)):
        raise InputError(f"hf://{rest}: expected hf://ORG/REPO[@REVISION][/FILE]")
    revision = found["revision"] or "main"
    shown = f"hf://{found['repo']}@{revision}" + (f"/{path}" if path else "")
    _refuse_archive(path, shown)
    return Reference(
        kind="hub",
        shown=shown,
        identity=shown,
        repo=found["repo"],
        revision=revision,
        path=path,
        sha256=sha256,
    )


def _web(url: str, sha256: str | None) -> Reference:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        host, port = "", None
    if not host:
        raise InputError("https://...: no address of a server can be read from it")
    where = f"[{host}]" if ":" in host else host
    where += "" if port is None else f":{port}"
    shown = f"{parts.scheme}://{where}{parts.path}"
    if parts.scheme == "http" and host not in _LOOPBACK and sha256 is None:
        raise InputError(
            f"{shown}: what comes over http:// can be changed on its way; give https://, or say "
            "what must arrive: #sha256=HEX at the end"
        )
    headers = {}
    if parts.username is not None:
        user = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        headers["Authorization"] = f"Basic {base64.b64encode(user.encode()).decode()}"
    kept = [
        (key, value)
        for key, value in parse_qsl(parts.query, keep_blank_values=True)
        if not _SIGNATURE.fullmatch(key)
    ]
    _refuse_archive(parts.path, shown)
    return Reference(
        kind="web",
        shown=shown,
        identity=shown + (f"?{urlencode(sorted(kept))}" if kept else ""),
        url=urlunsplit((parts.scheme, where, _quoted(parts.path.rstrip("/")), parts.query, "")),
        headers=headers,
        path=unquote(parts.path).strip("/"),
        sha256=sha256,
    )


def _quoted(path: str) -> str:
    """A path as a server is asked for it: what a browser would encode too, and nothing twice."""
    return quote(path, safe="/%:@!$&'()*+,;=~")


def _bucket(rest: str, sha256: str | None) -> Reference:
    if "?" in rest:
        raise InputError(
            "s3://...: has a query (?...), and a bucket is asked with credentials; give them as "
            "any client of S3 takes them (AWS_ACCESS_KEY_ID, AWS_PROFILE), or the signed address, "
            "https://..."
        )
    bucket, _, path = rest.rstrip("/").partition("/")
    shown = f"s3://{bucket}/{path}"
    if not bucket or "@" in bucket or not path or not is_safe(path):
        raise InputError("s3://...: expected s3://BUCKET/FOLDER or s3://BUCKET/FILE")
    _refuse_archive(path, shown)
    return Reference("bucket", shown, shown, url=shown, path=path, sha256=sha256)


def _refuse_archive(path: str, shown: str) -> None:
    if path.lower().endswith(ARCHIVES):
        raise InputError(
            f"{shown}: is an archive, and none is unpacked here: what one holds may lie outside of "
            "it; put the release up as the folder that it is, or give a file of weights"
        )
