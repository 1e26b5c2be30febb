"""Names in a corpus: HMACs with a secret salt, or cleaned file names for public data."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

from data_prep.errors import InputError
from data_prep.files import behind_link, write_once
from data_prep.layouts.case import Case, case_id
from data_prep.settings import PrepSettings

KEY_PATTERN = re.compile(r"[a-z0-9_-]{1,64}")
MINIMUM_SALT = 16
SALT_FILE = "salt"
KEYMAP_FILE = "keymap.csv"
QUARANTINE_FILE = "quarantine.csv"
QUARANTINE_HEADER = ("input", "code", "detail", "subject")
REFUSED_FILE = "refused.csv"
"""As the quarantine, of an input that gave no sample at all, or of what could not be read."""
REFUSED_FILES = "refused*.csv"
"""With those of single parts."""
REQUEST_FILE = "request.json"
WITHDRAWN_FILE = "withdrawn.txt"
"""What was withdrawn from the corpus, so that it never comes back."""
EXCLUDED_FILE = "excluded.txt"
"""What `exclude=` named when the corpus was made, so that no addition brings it in."""
DUPLICATES = "duplicates"
"""A folder of pictures of copies."""
DUPLICATES_OF_BEFORE = "duplicates.png"
"""Was one picture of all, from which no subject can be taken away."""
PRIVATE_FILES = (
    SALT_FILE,
    KEYMAP_FILE,
    QUARANTINE_FILE,
    REFUSED_FILE,
    REQUEST_FILE,
    EXCLUDED_FILE,
    DUPLICATES_OF_BEFORE,
)
SALTED_PATIENT = re.compile(r"patient-[0-9a-f]{32}")
"""Of `salted_patient`."""
KEYMAP_COLUMNS = ["key", "subject", "input", "input_subject", "case"]


def private_folder(output: Path) -> Path:
    """Where a corpus keeps what must not travel with it: salt, key map, quarantine."""
    output = behind_link(output)
    return output.with_name(output.name + ".private")


def read_withdrawn(private: Path) -> set[str]:
    """Keys, prints and subjects of what was withdrawn."""
    file = private / WITHDRAWN_FILE
    return set(file.read_text().splitlines()) if file.is_file() else set()


def slug(text: str) -> str:
    """A name in the alphabet of keys; a hash keeps long ones apart, and those of other letters."""
    cleaned = re.sub(r"[^a-z0-9_-]+", "-", text.lower()).strip("-") or "x"
    if text.isascii() and len(cleaned) <= 64:
        return cleaned
    return f"{cleaned[:47]}-{hashlib.blake2b(os.fsencode(text), digest_size=8).hexdigest()}"


def plain(name: str) -> str:
    """A name without what makes no difference between two: case, spaces, signs."""
    return re.sub(r"[\W_]+", "", name.casefold())


def key_names(
    cases: Sequence[Case], taken: Collection[str] = (), generation: int = 1
) -> dict[str, str]:
    """Keys from file names; from whole paths where names repeat, with a hash where those do.

    Args:
        cases: of an input.
        taken: keys that a corpus has already; whoever would get one of them gets a hash as well.
        generation: of what is added to it.
    """
    short = {case.name: slug(case_id(case)) for case in cases}
    # A list may hold absolute paths; where all of them lead is nobody's business.
    absolute = [case.name for case in cases if Path(case.name).is_absolute()]
    base = os.path.commonpath([str(Path(name).parent) for name in absolute]) if absolute else ""
    long = {
        name: slug(name.removeprefix(base).removesuffix(".gz").removesuffix(".nii"))
        for name in short
    }
    repeated = Counter(short.values())
    keys = {n: short[n] if repeated[short[n]] == 1 else long[n] for n in short}
    again = Counter([*keys.values(), *taken])
    of = f"{generation}\0" if generation > 1 else ""
    return {
        name: key
        if again[key] == 1
        else f"{key[:47]}-{hashlib.blake2b(os.fsencode(of + name), digest_size=8).hexdigest()}"
        for name, key in keys.items()
    }


def keyed_hash(salt: bytes, purpose: str, text: str) -> str:
    """HMAC-SHA256, 128 bits in hex; `purpose` keeps keys and subjects apart."""
    return hmac.new(salt, os.fsencode(f"{purpose}\0{text}"), hashlib.sha256).hexdigest()[:32]


def subject_name(
    settings: PrepSettings, salt: bytes, subject: str, patients: Collection[str]
) -> str:
    """What a corpus calls a subject of the input, the same in all inputs.

    Args:
        settings: of the prep.
        salt: its secret.
        subject: what the layout calls it.
        patients: of the layout, whose names are secret in any case.
    """
    if settings.keys == "hmac":
        return keyed_hash(salt, "subject", subject)
    return salted_patient(salt, subject) if subject in patients else slug(subject)


def salted_patient(salt: bytes, digest: str) -> str:
    """What a corpus with names of the input calls a patient of DICOM."""
    return f"patient-{keyed_hash(salt, 'subject', digest)}"


def read_salt(path: Path | None) -> bytes | None:
    """The secret in a file; InputError if it cannot be read or is short."""
    if path is None:
        return None
    try:
        salt = path.read_bytes().strip()
    except OSError as error:
        raise InputError(f"salt={path}: not readable ({error.strerror})") from error
    if len(salt) < MINIMUM_SALT:
        raise InputError(
            f"salt={path}: {len(salt)} bytes; {MINIMUM_SALT} or more are needed, for example from "
            "`openssl rand -hex 32`"
        )
    return salt


def new_salt() -> bytes:
    """A secret that nobody has had before."""
    return secrets.token_hex(32).encode()


def choose_salt(
    settings: PrepSettings, private: Path, begun: Path, patients: Collection[str]
) -> bytes:
    """The given salt, the one of an earlier prep of this corpus, or a new one; none if not needed.

    Args:
        settings: Of the prep.
        private: Its private folder.
        begun: Where the salt is kept until the corpus is there, so that all starts and all tasks
            have the same.
        patients: Of the layout; where names are kept, theirs alone need a salt.

    Raises:
        InputError: another salt came into the private folder since this prep has begun.
    """
    if settings.keys == "names" and not patients:
        return b""
    given = read_salt(settings.salt)
    if given is not None:
        return given
    kept = read_salt(private / SALT_FILE) if (private / SALT_FILE).is_file() else None
    salt = write_once(begun, kept or new_salt())
    if kept is not None and salt != kept:
        raise InputError(
            f"{private / SALT_FILE}: is not the salt that this prep began with; remove "
            f"{begun.parent} and start again"
        )
    return salt
