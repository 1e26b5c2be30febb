"""One file from a server to the disk: resumed, bounded, and told of while it comes."""

from __future__ import annotations

import http.client
import json
import os
import random
import shutil
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar
from urllib.parse import urljoin, urlsplit

from data_prep.errors import InputError, UnreachableError
from data_prep.files import read_note
from data_prep.progress import bar
from data_prep.references import Reference

LIMIT = 32 * 2**30
"""Bytes that a file, or all of a release, may have."""

PAUSES = (1.0, 2.0, 4.0, 8.0)
"""Seconds between tries, about; after the last one no other is made, unless enough has come."""

ENOUGH = 2**20
"""Bytes of a file after which tries are counted anew: so a server may break off now and then, and
one that gives little each time is given up."""

DENIED = "a signed address may have run out; a password goes before the host, USER:PASSWORD@"

TIMEOUT = 30.0
_BLOCK = 2**20
_PASSING = {408, 425, 429, 500, 502, 503, 504}
"""Answers that another try may change."""

T = TypeVar("T")


class TooLargeError(InputError):
    """A file has more bytes than it may."""


class PassingError(Exception):
    """What another try may mend; its text has no secrets."""


@dataclass
class Part:
    """An answer: the bytes of a file from `start` on.

    Attributes:
        stream: of the bytes.
        start: where they begin; 0 where the server does not resume.
        total: bytes of the whole file; None: the stream itself says where it ends.
        tag: tells the file's content apart from what lies there later; None: nothing does.
    """

    stream: IO[bytes]
    start: int
    total: int | None
    tag: str | None


class Source(Protocol):
    """A folder elsewhere."""

    def open(self, name: str, start: int, tag: str | None) -> Part:
        """The bytes of a file, from `start` if it is still the one that `tag` is of.

        Raises:
            InputError: it is not there, or not for us.
            PassingError: another try may mend it.
        """


class Web:
    """Files below a URL.

    Args:
        url_of: gives the URL of a file, which may be signed.
        shown: what to call a file in messages.
        headers: of requests to that server, and to no other one that it may redirect to.
        immutable: whether a URL never holds other bytes, so that no tag is needed to resume.
        denied: what to do where access is denied.
    """

    def __init__(
        self,
        url_of: Callable[[str], str],
        shown: Callable[[str], str],
        headers: Mapping[str, str],
        *,
        immutable: bool = False,
        denied: str = "",
    ) -> None:
        self.url_of, self.shown, self.headers = url_of, shown, headers
        self.immutable, self.denied = immutable, denied
        self._opener = urllib.request.build_opener(_Redirects())

    def open(self, name: str, start: int, tag: str | None) -> Part:
        """See `Source`."""
        request = urllib.request.Request(self.url_of(name), headers=dict(self.headers))
        if start:
            request.add_header("Range", f"bytes={start}-")
            if tag and not self.immutable:
                request.add_header("If-Range", tag)
        try:
            answer = self._opener.open(request, timeout=TIMEOUT)
        except urllib.error.HTTPError as error:
            error.close()
            if start and error.code == 416:
                return self.open(name, 0, None)
            raise self._refusal(name, error.code) from None
        except (OSError, http.client.HTTPException) as error:
            if isinstance(getattr(error, "reason", error), ssl.SSLCertVerificationError):
                raise InputError(
                    f"{self.shown(name)}: its certificate is not trusted; where a proxy has one of "
                    "its own, SSL_CERT_FILE names it"
                ) from None
            raise PassingError(reason(error)) from None
        resumed = answer.status == 206 and _starts(answer.headers, start)
        length = answer.headers.get("Content-Length")
        # Without either, the end of the file and a lost connection look the same.
        if length is None and answer.headers.get("Transfer-Encoding", "").lower() != "chunked":
            answer.close()
            raise InputError(f"{self.shown(name)}: the server does not say how long it is")
        begins = start if resumed else 0
        total = None if length is None else begins + int(length)
        return Part(answer, begins, total, _strong(answer.headers.get("ETag")))

    def _refusal(self, name: str, code: int) -> Exception:
        if code in _PASSING:
            return PassingError(f"the server answers {code}")
        shown = self.shown(name)
        if code in (401, 403):
            return InputError(f"{shown}: access is denied ({code}); {self.denied}")
        if code in (404, 410):
            return InputError(f"{shown}: is not there ({code}); check the address")
        if 300 <= code < 400:
            return InputError(f"{shown}: redirects to what is not safe to follow, or in a circle")
        return InputError(f"{shown}: the server answers {code}")


class Bucket:
    """Files below an s3:// URL, through fsspec, with the credentials that s3fs finds.

    Args:
        url: of the folder.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._process = 0
        self._open_files()

    def _open_files(self) -> None:
        try:
            import fsspec

            opened = fsspec.core.url_to_fs(self.url, skip_instance_cache=True)
        except ImportError as error:
            raise InputError(
                f"{self.url}: s3:// needs s3fs; pip install 'voxelith[s3]' or pip install s3fs"
            ) from error
        (self._files, self._folder), self._process = opened, os.getpid()

    @property
    def files(self) -> Any:
        """fsspec's, one for each process: it refuses to work in a fork of the one that made it."""
        if self._process != os.getpid():
            self._open_files()
        return self._files

    def open(self, name: str, start: int, tag: str | None) -> Part:
        """See `Source`."""
        path = f"{self._folder}/{name}"
        try:
            facts: dict[str, Any] = self.files.info(path)
            now = facts.get("ETag") or facts.get("etag")
            begins = start if tag and now == tag else 0
            stream = self.files.open(path, "rb")
            stream.seek(begins)
        except FileNotFoundError:
            raise InputError(f"s3://{path}: is not there; check the address") from None
        except PermissionError:
            raise InputError(f"s3://{path}: access is denied; check your credentials") from None
        except Exception as error:  # of botocore and aiohttp, which are not ours to import
            raise PassingError(reason(error)) from None
        return Part(stream, begins, int(facts["size"]), now)


def download(
    source: Source,
    name: str,
    to: Path,
    *,
    shown: str,
    limit: int = LIMIT,
    quiet: bool = False,
    key: str = "VOXELITH_CACHE",
) -> None:
    """Downloads a file; what an earlier try left is gone on with.

    The bytes go to `NAME.part` beside it, and `NAME.part.json` says what they are of.

    Args:
        source: of the file.
        name: of it there.
        to: where it appears, when it is whole.
        shown: what to call it in messages.
        limit: bytes that it may have.
        quiet: without a bar.
        key: what says where the folder of `to` lies.

    Raises:
        InputError: it is not there, not for us or too large.
        UnreachableError: tries came to nothing; what has come stays for the next one.
    """
    part, note = to.with_name(f"{to.name}.part"), to.with_name(f"{to.name}.part.json")

    def attempt() -> None:
        before = read_note(note) if part.exists() else {}
        start = part.stat().st_size if before else 0
        got = source.open(name, start, before.get("tag"))
        if got.start and got.tag != before.get("tag"):
            got.stream.close()  # a server that does not heed If-Range: it has another file by now
            got = source.open(name, 0, None)
        with closing(got.stream):
            try:
                _check_room(got, to.parent, shown, limit, key)
            except InputError:
                part.unlink(missing_ok=True)
                raise
            # Where nothing tells a later file from this one, the next try begins anew.
            resumable = got.tag is not None or getattr(source, "immutable", False)
            if not got.start:
                part.unlink(missing_ok=True)  # before the note, which must not speak of old bytes
            note.write_text(json.dumps({"tag": got.tag} if resumable else None))
            _copy(got, part, shown, limit, quiet)

    def size() -> int:
        return part.stat().st_size if part.exists() else 0

    retried(attempt, shown, size, enough=ENOUGH)
    part.replace(to)
    note.unlink()


def folder_source(wanted: Reference) -> Source:
    """Files of the folder that a reference names, on a web server or in a bucket."""
    if wanted.kind == "bucket":
        return Bucket(wanted.url)
    return Web(wanted.url_of, wanted.shown_of, wanted.headers, denied=DENIED)


def retried(
    work: Callable[[], T],
    shown: str,
    progress: Callable[[], int] = lambda: 0,
    pauses: Sequence[float] = (),
    enough: int = 1,
) -> T:
    """What `work` returns, tried again while it is `PassingError`.

    Args:
        work: what is tried.
        shown: what it is about, for messages.
        progress: what has come so far; where `enough` more has, the count of tries begins anew.
        pauses: seconds between tries, about, so that not all who failed at once come back at once;
            by default `PAUSES`.
        enough: of progress. What there is to come bounds all tries.

    Raises:
        UnreachableError: the last try came to nothing either.
    """
    pauses = pauses or PAUSES
    left, before = iter(pauses), progress()
    while True:
        try:
            return work()
        except PassingError as error:
            now = progress()
            if now >= before + enough:
                left, before = iter(pauses), now
            pause = next(left, None)
            if pause is None:
                kept = f"; {now:,} bytes are kept and the next try goes on there" if now else ""
                raise UnreachableError(
                    f"{shown}: {error}, {len(pauses) + 1} tries in a row{kept}; check the network "
                    "and start again"
                ) from None
            time.sleep(pause * random.uniform(0.5, 1.5))


def _copy(got: Part, part: Path, shown: str, limit: int, quiet: bool) -> None:
    allowed = limit if got.total is None else got.total
    with (
        part.open("r+b" if got.start else "wb") as file,
        bar(
            total=got.total,
            initial=got.start,
            desc=part.name.removesuffix(".part"),
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            disable=quiet or (got.total or _BLOCK) < _BLOCK,
        ) as shown_bar,
    ):
        file.seek(got.start)
        file.truncate()
        written = got.start
        try:
            while block := _read(got.stream):
                written += len(block)
                if written > allowed:
                    part.unlink(missing_ok=True)
                    raise TooLargeError(
                        f"{shown}: sends more than the {allowed:,} bytes that it may have"
                    )
                file.write(block)
                shown_bar.update(len(block))
        finally:
            file.flush()
            os.fsync(file.fileno())
    if got.total is not None and written < got.total:
        raise PassingError(f"the connection ended after {written:,} of {got.total:,} bytes")


def _read(stream: IO[bytes]) -> bytes:
    try:
        return stream.read(_BLOCK)
    except Exception as error:  # of any library that a stream may be of
        raise PassingError(reason(error)) from None


def _check_room(got: Part, folder: Path, shown: str, limit: int, key: str) -> None:
    """Refuses what is too large before a byte of it is written."""
    if got.total is None:
        return
    if got.total > limit:
        raise TooLargeError(
            f"{shown}: has {got.total:,} bytes, more than the {limit:,} that it may"
        )
    free = shutil.disk_usage(folder).free
    if got.total - got.start > free:
        raise InputError(
            f"{shown}: has {got.total:,} bytes, and {folder} has room for {free:,}; make room or "
            f"set {key} to another folder"
        )


def _starts(headers: Any, start: int) -> bool:
    """Whether an answer to a range begins where it was asked to."""
    return str(headers.get("Content-Range", "")).startswith(f"bytes {start}-")


def _strong(tag: str | None) -> str | None:
    """A weak tag says that a file means the same, not that its bytes are the same."""
    return tag if tag and not tag.startswith("W/") else None


def reason(error: BaseException) -> str:
    """What went wrong, without the address, which may be signed."""
    within = getattr(error, "reason", None)
    inner = within if isinstance(within, BaseException) else error
    said = getattr(inner, "strerror", None) if isinstance(inner, OSError) else None
    return f"no answer ({said or type(inner).__name__})"


def check_redirect(url: str, to: str) -> None:
    """Refuses to go on to what is not safe to follow.

    Args:
        url: of a server.
        to: where it redirects to; a path stays on that server.

    Raises:
        InputError: to neither http nor https, or from the latter to the former.
    """
    before, after = urlsplit(url), urlsplit(urljoin(url, to))
    if after.scheme not in ("http", "https") or (before.scheme, after.scheme) == ("https", "http"):
        raise InputError(
            f"{before.scheme}://{before.hostname}: redirects to {after.scheme}://, which is not "
            "safe to follow"
        )


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows to http and https alone, never from the latter to the former.

    What is meant for one server is not told to another.
    """

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        check_redirect(req.full_url, newurl)
        before, after = urlsplit(req.full_url), urlsplit(newurl)
        made = super().redirect_request(req, fp, code, msg, headers, newurl)
        if made is not None and (before.scheme, before.netloc) != (after.scheme, after.netloc):
            for name in ("Authorization", "Cookie"):
                made.remove_header(name)
        return made
