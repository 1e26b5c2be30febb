"""The Hugging Face hub through its own client: what a repository holds, and uploads to it.

The client is slow to import and reads HF_ENDPOINT when it is, so it is imported where it is used
and told the address each time.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.download import PassingError
from data_prep.errors import InputError, UnreachableError
from data_prep.references import Reference, parse
from pretrain.manifest import FILES, OPTIONAL, read_manifest


@dataclass(frozen=True)
class HubFile:
    """A file as the hub lists it; the hash is known of large ones."""

    size: int | None
    sha256: str | None


@dataclass(frozen=True)
class HubFacts:
    """A repository at a commit."""

    commit: str
    files: dict[str, HubFile]


def about(wanted: Reference) -> HubFacts:
    """What the hub says of a repository at a revision.

    Raises:
        InputError: there is none, or it is not for us.
        PassingError: no answer; another try may get one.
    """
    try:
        info = _client().model_info(wanted.repo, revision=wanted.revision, files_metadata=True)
    except Exception as error:
        raise _plain(error, wanted.shown) from None
    files = {
        one.rfilename: HubFile(one.size, one.lfs.sha256 if one.lfs else None)
        for one in info.siblings or ()
    }
    if not info.sha:
        raise InputError(f"{wanted.shown}: the hub does not tell its commit")
    return HubFacts(str(info.sha), files)


def url_of(wanted: Reference, name: str, commit: str) -> str:
    """The address of a file at a commit."""
    from huggingface_hub import hf_hub_url

    return str(hf_hub_url(wanted.repo, name, revision=commit, endpoint=_endpoint()))


def headers() -> dict[str, str]:
    """Of requests to the hub: the user's token, if there is one."""
    from huggingface_hub.utils import build_hf_headers

    return dict(build_hf_headers(library_name="voxelith"))


def destination(ref: str) -> Reference:
    """Where `--push` goes to.

    Raises:
        InputError: it is no repository on the hub.
    """
    there = parse(ref)
    if there.kind != "hub" or there.path or there.sha256:
        raise InputError(f"--push {there.shown}: goes to the hub; give hf://ORG/REPO[@BRANCH]")
    return there


def push(release: Path, there: Reference) -> str:
    """Uploads a release as one commit; a repository that is not there is made, private.

    Args:
        release: its folder, which is verified first.
        there: the repository, see `destination`.

    Returns:
        The reference of the commit.

    Raises:
        InputError: no release, or the hub denies it.
        UnreachableError: no answer.
    """
    told = read_manifest(release)
    client = _client()
    try:
        client.create_repo(there.repo, private=True, exist_ok=True)
        done = client.upload_folder(
            repo_id=there.repo,
            folder_path=release,
            revision=there.revision,
            allow_patterns=[*FILES, *OPTIONAL, "SHA256SUMS"],
            commit_message=f"{told.name}, digest {told.digest[:12]}",
        )
    except Exception as error:
        kept = f"{release} is whole; `hf upload {there.repo} {release}` tries again"
        plain = _plain(error, there.shown)
        if isinstance(plain, InputError):
            raise InputError(f"{'; '.join(plain.problems)}; {kept}") from None
        if isinstance(plain, PassingError):
            raise UnreachableError(f"{there.shown}: {plain}; {kept}") from None
        raise
    return f"hf://{there.repo}@{done.oid}"


def _client() -> Any:
    from huggingface_hub import HfApi

    return HfApi(endpoint=_endpoint(), library_name="voxelith")


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or None


def _plain(error: Exception, shown: str) -> Exception:
    """What the client raised, said without addresses, which may be signed."""
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RevisionNotFoundError

    code = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, HFValidationError):
        return InputError(f"{shown}: is no name of a repository on the hub; give hf://ORG/REPO")
    if isinstance(error, GatedRepoError) or code in (401, 403):
        return InputError(
            f"{shown}: access is denied, or there is no such repository; accept its terms on the "
            "hub and log in, `hf auth login` or HF_TOKEN"
        )
    if isinstance(error, RevisionNotFoundError):
        return InputError(f"{shown}: has no such revision; give a branch, a tag or a commit")
    if code in (404, 410):
        return InputError(f"{shown}: is not there ({code}); check the name")
    if code is not None and code < 500 and code not in (408, 429):
        return InputError(f"{shown}: the hub answers {code}")
    if code is not None:
        return PassingError(f"the hub answers {code}")
    # What the client sends with is another library in each of its major versions.
    library = type(error).__module__.partition(".")[0]
    if isinstance(error, OSError) or library in ("httpx", "httpx2", "httpcore", "requests"):
        return PassingError(f"no answer ({type(error).__name__})")
    return error
