"""`voxelith fetch`: a checkpoint from anywhere to a folder or file on this machine, verified.

A reference whose content is there is answered without the network. Whatever else a pinned reference
gives later is refused, until its pin is removed.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data_prep.download import (
    DENIED,
    LIMIT,
    Bucket,
    Source,
    Web,
    download,
    folder_source,
    retried,
)
from data_prep.errors import CorruptionError, InputError
from data_prep.files import file_digest, make_folder
from data_prep.references import WEIGHTS, Reference, is_reference, is_safe, parse
from pretrain.cache import Cache, Fetched, cache_folder
from pretrain.manifest import MAX_TEXT, listed_files, read_manifest, stored_shapes
from pretrain.registry import KNOWN, reference_of

SUMS = "SHA256SUMS"

_YES = {"1", "on", "yes", "true"}


def resolve(ref: str | Path) -> Path:
    """The local path of a checkpoint: of a reference or known name once it is fetched.

    A path is left alone, also one where nothing lies: whoever opens it says so.

    Raises:
        InputError, UnreachableError: as `fetch`.
    """
    text = str(ref)
    if is_reference(text) or (text in KNOWN and not Path(text).exists()):
        return fetch(text).path
    return Path(ref)


def fetch(ref: str, *, offline: bool = False, again: bool = False, limit: int = LIMIT) -> Fetched:
    """Gets a checkpoint, from the cache or from where it lies, and verifies it.

    Args:
        ref: a reference, the name of a known checkpoint, or a path of what is here.
        offline: without the network; HF_HUB_OFFLINE says so too.
        again: asks where it lies, though it is in the cache, whether it is still the same.
        limit: bytes that it may have.

    Raises:
        InputError: it is not there, not for us, too large, or not in the cache and offline.
        CorruptionError: it is not what it was, or not what it says it is; nothing of it is kept.
        UnreachableError: no answer; what has come is kept and gone on with.
    """
    if not is_reference(ref):
        if Path(ref).exists():
            return _local(Path(ref))
        name, ref = ref, reference_of(ref)
        if not is_reference(ref):  # it comes with the package
            ours, digest = _local(Path(ref)), KNOWN[name].sha256
            if ours.digest != digest:
                raise CorruptionError(
                    f"{name}: {ref} has the digest {ours.digest}, and {digest} is known; install "
                    "voxelith anew"
                )
            return ours
    wanted = parse(ref)
    cache = Cache(cache_folder(), wanted)
    offline = offline or os.environ.get("HF_HUB_OFFLINE", "").lower() in _YES
    if again and offline:
        raise InputError(f"{wanted.shown}: again=true asks the server, and offline says not to")
    # What is there needs no lock: a cache that many read may be one that few can write.
    found = None if again else cache.there()
    if found is not None:
        return found
    if offline:
        raise InputError(
            f"{wanted.shown}: is not in the cache ({cache.folder}), and offline is set; fetch it "
            "where there is a network: VOXELITH_CACHE says where the cache lies"
        )
    make_folder(cache.folder, "VOXELITH_CACHE")
    with cache.alone():
        # Another process may have fetched it while this one waited.
        found = None if again else cache.there()
        return found or _arrive(wanted, cache, limit)


@dataclass(frozen=True)
class Origin:
    """Where a reference leads: files by name, and what is known of them beforehand."""

    source: Source
    shown: Callable[[str], str]
    commit: str | None = None
    digests: dict[str, str] | None = None
    size: int | None = None


def _arrive(wanted: Reference, cache: Cache, limit: int) -> Fetched:
    origin = _origin(wanted)
    size = "" if origin.size is None else f"{origin.size:,} bytes, "
    print(
        f"Fetching {wanted.shown} to {cache.folder} ({size}at most {limit / 2**30:.0f} GiB)",
        file=sys.stderr,
    )
    cache.partial.mkdir(parents=True, exist_ok=True)
    take = _take_file if wanted.is_file else _take_release
    try:
        return take(wanted, cache, origin, limit)
    except InputError as error:
        # An address that ran out on the way is signed anew, and the rest comes then.
        parts = [file for file in cache.partial.rglob("*") if file.is_file()]
        if isinstance(error, CorruptionError) or not parts:
            shutil.rmtree(cache.partial, ignore_errors=True)
        raise


def _take_file(wanted: Reference, cache: Cache, origin: Origin, limit: int) -> Fetched:
    name = wanted.path.rsplit("/", 1)[-1]
    told = (origin.digests or {}).get(name)
    if told is not None:
        cache.check(told)  # before the bytes are asked for
        found = cache.there()
        if found is not None:
            shutil.rmtree(cache.partial, ignore_errors=True)
            return found
    file = cache.partial / wanted.name
    download(origin.source, name, file, shown=wanted.shown, limit=limit)
    digest = file_digest(file)
    if told not in (None, digest):
        raise CorruptionError(
            f"{wanted.shown}: its bytes are not those that the hub lists (sha256 {digest}, listed "
            f"{told}); nothing of it is kept, fetch it again"
        )
    cache.check(digest)
    _check_weights(file, wanted.shown)
    return cache.keep(file, wanted.name, digest, origin.commit)


def _take_release(wanted: Reference, cache: Cache, origin: Origin, limit: int) -> Fetched:
    """The sums come first: they are what is pinned, and they alone say which files there are."""
    folder = cache.partial / "release"
    folder.mkdir(exist_ok=True)
    sums = folder / SUMS
    sums.unlink(missing_ok=True)
    shown = origin.shown(SUMS)
    try:
        download(origin.source, SUMS, sums, shown=shown, limit=MAX_TEXT, quiet=True)
        text = sums.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise CorruptionError(f"{shown}: is not text") from None
    except InputError as error:
        raise InputError(
            [
                *error.problems,
                f"{wanted.shown}: is taken for a release's folder, whose SHA256SUMS comes first; "
                f"the address of a file of weights ends in {', '.join(WEIGHTS)}",
            ]
        ) from None
    cache.check(hashlib.sha256(sums.read_bytes()).hexdigest())
    found = cache.there()
    if found is not None:
        shutil.rmtree(cache.partial, ignore_errors=True)
        return found
    left, listed = limit, listed_files(text, shown)
    for name, digest in listed.items():
        file = folder / name
        if not (file.is_file() and file_digest(file) == digest):
            file.unlink(missing_ok=True)
            download(origin.source, name, file, shown=origin.shown(name), limit=left)
            if file_digest(file) != digest:
                raise CorruptionError(
                    f"{origin.shown(name)}: its bytes are not those that SHA256SUMS lists; nothing "
                    "of the release is kept, fetch it again"
                )
        left -= file.stat().st_size
    for file in folder.iterdir():  # what an interrupted release of before has left
        if file.name != SUMS and file.name not in listed:
            file.unlink()
    try:
        release = read_manifest(folder)
    except InputError as error:
        told = [problem.replace(str(folder), wanted.shown) for problem in error.problems]
        raise type(error)(told) from None
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", release.name).lstrip(".-") or "release"
    return cache.keep(folder, name, release.digest, origin.commit)


def _origin(wanted: Reference) -> Origin:
    if wanted.kind == "hub":
        return _on_the_hub(wanted)
    if not wanted.is_file:
        return Origin(folder_source(wanted), wanted.shown_of)
    if wanted.kind == "bucket":
        return Origin(Bucket(wanted.url.rsplit("/", 1)[0]), lambda name: wanted.shown)
    source = Web(lambda name: wanted.url, lambda name: wanted.shown, wanted.headers, denied=DENIED)
    return Origin(source, lambda name: wanted.shown)


def _on_the_hub(wanted: Reference) -> Origin:
    """Asks the hub for the commit of a revision and its files, through its own client.

    The bytes come as those of other servers do: the client goes on with a file only while it runs,
    and a commit's files never change, so they can be gone on with at any time.
    """
    from pretrain.hub import about, headers, url_of

    facts = retried(lambda: about(wanted), wanted.shown)
    unsafe = [name for name in facts.files if not is_safe(name)]
    if unsafe:
        raise CorruptionError(
            f"{wanted.shown}: lists {unsafe[0]!r}, a path out of its folder; nothing is fetched"
        )
    within = wanted.path.rpartition("/")[0] if wanted.is_file else wanted.path
    prefix = f"{within}/" if within else ""
    first = wanted.path if wanted.is_file else f"{prefix}{SUMS}"
    if first not in facts.files:
        weights = [name for name in facts.files if name.lower().endswith(WEIGHTS)]
        some = ", ".join(f"hf://{wanted.repo}@{wanted.revision}/{name}" for name in weights[:5])
        raise InputError(
            f"{wanted.shown}: has no {first}"
            + ("" if wanted.is_file else ", so it is no release")
            + (f"; files of weights there: {some}" if some else "; and no files of weights")
        )

    def shown(name: str) -> str:
        return wanted.shown if wanted.is_file else f"{wanted.shown}/{name}"

    source = Web(
        lambda name: url_of(wanted, f"{prefix}{name}", facts.commit),
        shown,
        headers(),
        immutable=True,
        denied="accept its terms on the hub and log in, `hf auth login` or HF_TOKEN",
    )
    inside = {n.removeprefix(prefix): one for n, one in facts.files.items() if n.startswith(prefix)}
    digests = {name: one.sha256 for name, one in inside.items() if one.sha256}
    size = facts.files[first].size if wanted.is_file else None
    return Origin(source, shown, facts.commit, digests, size)


def _check_weights(file: Path, shown: str) -> None:
    """Refuses what cannot be weights, such as the page of a login; nothing in it is run.

    Raises:
        CorruptionError: it is not what its name says.
    """
    if file.suffix.lower() == ".safetensors":
        try:
            stored_shapes(file)
        except CorruptionError as error:
            raise CorruptionError(
                [problem.replace(str(file), shown) for problem in error.problems]
            ) from None
        return
    with file.open("rb") as opened:
        begin = opened.read(64).lstrip().lower()
    if not begin or begin.startswith((b"<", b"{", b"version https://git-lfs")):
        raise CorruptionError(
            f"{shown}: is no file of weights, it begins with {begin[:32]!r}; open the address in a "
            "browser to see what it gives"
        )


def _local(path: Path) -> Fetched:
    """What is here already: a release is verified, a file of weights is looked at."""
    if path.is_dir():
        release = read_manifest(path)
        return Fetched(path, "release", release.digest, str(path), cached=True)
    _check_weights(path, str(path))
    return Fetched(path, "weights", file_digest(path), str(path), cached=True)
