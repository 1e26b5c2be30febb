"""What every layout gives: cases with their images and labels, and the books of all other files."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.errors import InputError, Naming
from data_prep.images import BESIDE, DETACHED, SUFFIXES, SeriesFiles

# Files that data sets ship beside their scans; they are counted, not judged.
SIDE_SUFFIXES = (
    ".json", ".csv", ".tsv", ".md", ".txt", ".rst", ".yaml", ".yml", ".bval", ".bvec", ".xml",
    ".html", ".pdf", ".xlsx", ".cfg",
)  # fmt: skip
SIDE_NAMES = ("license", "licence", "readme", "changes", "citation")
CT_WORDS = {"ct", "cta", "cect", "ldct"}
MR_WORDS = {
    "mr", "mri", "t1", "t1w", "t1c", "t1ce", "t1gd", "t2", "t2w", "t2s", "flair", "dwi", "adc",
    "swi", "bold", "dce", "tof", "mprage", "cinemri",
}  # fmt: skip
OTHER_WORDS = {"pet": "PET", "suv": "PET", "fdg": "PET", "spect": "SPECT"}
BIDS_SUFFIXES = (
    "T1w", "T2w", "PDw", "T2starw", "FLAIR", "inplaneT1", "inplaneT2", "PDT2", "angio", "T2star",
    "FLASH", "PD", "T1map", "T2map", "T2starmap", "R1map", "R2map", "R2starmap", "PDmap", "MTRmap",
    "MTsat", "UNIT1", "T1rho", "MWFmap", "MTVmap", "Chimap", "S0map", "M0map", "MESE", "MEGRE",
    "VFA", "IRT1", "MP2RAGE", "MPM", "MTS", "MTR", "bold", "cbv", "sbref", "phase", "noRF", "dwi",
    "ADC", "FA", "colFA", "expADC", "trace", "asl", "m0scan", "phasediff", "phase1", "phase2",
    "magnitude", "magnitude1", "magnitude2", "fieldmap", "epi", "TB1DAM", "TB1EPI", "TB1AFI",
    "TB1TFL", "TB1RFM", "TB1SRGE", "TB1map", "RB1COR", "RB1map", "pet", "mrsi", "mrsref",
)  # fmt: skip
"""Of images of MR and PET, in the schema of the BIDS specification."""
SEQUENCES = {suffix.lower() for suffix in BIDS_SUFFIXES} | CT_WORDS | MR_WORDS | OTHER_WORDS.keys()
SEQUENCES |= {"cbct", "gre", "mra", "mtw", "minip", "qsm", "dti", "md", "b0", "dsc", "cbf", "stir"}
"""What a scan may be said to be, in small letters: all else that stands there may be a name."""
LABEL_WORDS = {
    "seg", "dseg", "aseg", "label", "labels", "mask", "masks", "segmentation", "segmentations",
    "gt", "groundtruth", "annotation", "annotations", "parcellation",
}  # fmt: skip
# Between the channels of a case in one cell or word: names of sequences, paths of images.
BETWEEN_CHANNELS = ";"
GROUPS = ("sex", "age", "site")
"""What fairness is judged by."""


@dataclass(frozen=True)
class Case:
    """One scan of the input.

    Attributes:
        name: Path of the (first) image as the input gives it; never stored.
        images: One file, or one file per channel on a common grid; of a DICOM series the first.
        label: A label map.
        organs: Instead of a label map, a mask file per structure: (name of the structure, file).
        mask: Voxels that are not valid.
        id: What the data set calls the case, as in its lists of folds; the file's stem if empty.
        sequence: Name of the channel; of several channels with ';' between them. Several names
            and one image mean a 4D file.
        split: train, validation, test or empty.
        fold: Number of the fold that validates on this case; None if it is in none.
        group: What fairness is judged by: sex, age, site.
        series: Of DICOM, all files of the volume.
        frame: Of a 4D file, the number of its volume that the case is.
    """

    name: str
    images: tuple[Path, ...]
    label: Path | None = None
    organs: tuple[tuple[str, Path], ...] = ()
    mask: Path | None = None
    id: str = ""
    subject: str = ""
    modality: str | None = None
    sequence: str = ""
    source: str = ""
    licence: str = ""
    split: str = ""
    fold: int | None = None
    group: tuple[tuple[str, str], ...] = ()
    series: SeriesFiles | None = None
    frame: int | None = None

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the channels as far as the input tells them."""
        return tuple(self.sequence.split(BETWEEN_CHANNELS)) if self.sequence else ()

    @property
    def label_files(self) -> tuple[Path, ...]:
        """The label map or the masks of the structures; empty for a case without labels."""
        return (self.label,) if self.label else tuple(path for _, path in self.organs)

    @property
    def image_files(self) -> tuple[Path, ...]:
        """Every file that holds some of the image."""
        return self.series.files if self.series else self.images

    @property
    def whole(self) -> tuple[Path, ...]:
        """The file or series that the case is a volume of: the same for all of its volumes."""
        return (self.series.first,) if self.series else self.images

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file of the case."""
        return (*self.image_files, *self._beside_images)

    @property
    def roles(self) -> tuple[tuple[str, str, Path], ...]:
        """Every file of the case with what it is taken for, and of a mask its structure."""
        label = [("label", "", self.label)] if self.label else []
        return (
            *(("image", "", path) for path in self.image_files),
            *(label or [("organ", name, path) for name, path in self.organs]),
            *([("mask", "", self.mask)] if self.mask else []),
        )

    @property
    def stated_files(self) -> tuple[Path, ...]:
        """Those that a list can state; of a DICOM series the first."""
        return (*self.images, *self._beside_images)

    @property
    def _beside_images(self) -> tuple[Path, ...]:
        return (*self.label_files, *((self.mask,) if self.mask else ()))


@dataclass(frozen=True)
class LeftOut:
    """A file that is no sample: its name in the input, a stable code, and what was found.

    `subject` is known to the layout where no case is; of a case it is the case's.
    """

    name: str
    code: str
    detail: str
    subject: str = ""


@dataclass
class Layout:
    """What was recognised in the input.

    Attributes:
        classes: Label values and their names, where the data set states them.
        regions: Names of unions of label values, where the data set states them.
        folds: The content of splits_final.json where the data set has one.
        files: Names of all files of a folder, to be compared with what becomes of them.
        patients: Subjects that are digests of a patient's number in DICOM, without a secret: who
            counts through all numbers has them, so no corpus holds them as they are.
    """

    description: str
    cases: list[Case] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    classes: dict[int, str] | None = None
    regions: dict[str, tuple[int, ...]] = field(default_factory=dict)
    folds: list[dict[str, list[str]]] | None = None
    files: frozenset[str] = frozenset()
    patients: set[str] = field(default_factory=set)


def case_id(case: Case) -> str:
    """What the data set calls a case."""
    return case.id or stem(Path(case.name))


def is_image(path: Path) -> bool:
    """Whether the name is that of an image file; a file of a DICOM series may have any."""
    return path.name.lower().endswith(SUFFIXES)


def may_be_dicom(path: Path) -> bool:
    """Whether a file could be DICOM by its name: it has no other known one."""
    return not is_image(path) and not _is_side_file(path)


def stem(path: Path) -> str:
    """The file name without what says its format."""
    lower = path.name.lower()
    for suffix in SUFFIXES:
        if lower.endswith(suffix):
            return path.name[: -len(suffix)]
    return path.stem


def words(name: str) -> list[str]:
    """Lower-case words of a relative path, split at everything but letters and digits."""
    lower = name.lower()
    for suffix in SUFFIXES:
        lower = lower.removesuffix(suffix)
    return [word for word in re.split(r"[^a-z0-9]+", lower) if word]


def known_sequence(text: str) -> str:
    """The text if it is the name of a sequence, or nothing: it goes into the corpus as it is."""
    return text if text.lower() in SEQUENCES else ""


def looks_like_a_label(name: str) -> bool:
    """Whether a word of the path says label or mask."""
    return any(word in LABEL_WORDS or word.startswith("labels") for word in words(name))


def refused_label(name: str) -> LeftOut:
    """An image that is left out since `looks_like_a_label` says so."""
    detail = "its name says label or mask; list it in a CSV to use it"
    return LeftOut(name, "looks_like_a_label", detail)


_MODALITY_OF = dict.fromkeys(MR_WORDS, "MR") | dict.fromkeys(CT_WORDS, "CT") | OTHER_WORDS


def modality_from_name(name: str) -> str | None:
    """CT, MR or another modality, if a word of the path says so; the file's own name wins.

    A folder that names several, CT_MRI, says nothing of what lies in it.
    """
    *folders, own = name.split("/")
    told = _modalities(own)
    if told:
        return told[-1]
    for folder in reversed(folders):
        told = _modalities(folder)
        if len(set(told)) == 1:
            return told[0]
    return None


def _modalities(part: str) -> list[str]:
    return [_MODALITY_OF[word] for word in words(part) if word in _MODALITY_OF]


def subject_from_name(name: str) -> str:
    """The subject of a BIDS path (`sub-01/...`), or an empty string."""
    found = re.search(r"(?:^|[/_])sub-([A-Za-z0-9]+)", name)
    return found.group(1) if found else ""


def below(folder: Path, stated: str) -> Path | None:
    """The path that a data set's own list states; None if it leads out of the folder, or is none.

    Links in the folder may lead anywhere: who can put them there can read what they lead to.
    """
    path, whole = Path(stated), folder.absolute()
    if path.is_absolute() and path.is_relative_to(whole):
        path = path.relative_to(whole)
    if not stated or path.is_absolute() or ".." in path.parts:
        return None
    return folder / path


def is_there(path: Path, folder: bool = False) -> bool:
    """Whether a file or folder is there; of a name that none can have too."""
    try:
        return path.is_dir() if folder else path.is_file()
    except OSError:
        return False


def read_description(path: Path) -> Any:
    """What is in the JSON file that describes a data set.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON, or of more levels or other characters than one can work with.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(data, ensure_ascii=False).encode()  # halves of characters cannot be stored
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    return data


def files_below(root: Path) -> list[Path]:
    """All files below a folder, in a fixed order; not hidden ones, and no pipes or sockets.

    Links are followed, since data is often linked together. A folder that several ways lead to is
    seen once, by the shortest, and rather by its own name than by a link.

    Raises:
        InputError: with all folders that cannot be read.
    """
    closed: list[str] = []
    found: list[Path] = []
    level, seen = [root], {_identity(root)}
    while level:
        folders: list[Path] = []
        for here in level:
            try:
                for path in sorted(p for p in here.iterdir() if not p.name.startswith(".")):
                    if path.is_file():
                        found.append(path)
                    elif path.is_dir():
                        folders.append(path)
                    elif path.is_symlink():
                        # A link to nothing counts too: it is a case whose file is missing.
                        found.append(path)
            except OSError as error:
                closed.append(f"{here}: cannot be read ({error.strerror})")
        level = []
        for path in sorted(folders, key=lambda path: (path.is_symlink(), path)):
            if (place := _identity(path)) not in seen:
                seen.add(place)
                level.append(path)
    if closed:
        count = f"{len(closed)} folders of {root} cannot be read"
        raise InputError([Naming(problem, count) for problem in closed])
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _identity(folder: Path) -> tuple[int, int]:
    state = folder.stat()
    return state.st_dev, state.st_ino


def sort_out(root: Path, files: list[Path], layout: Layout) -> list[Path]:
    """The images among the files; side files and strangers go to the layout's books."""
    images = []
    headers = {path.parent for path in files if path.name.lower().endswith(DETACHED)}
    for path in files:
        name = path.relative_to(root).as_posix()
        if is_image(path):
            images.append(path)
        elif _is_side_file(path) or (path.parent in headers and is_beside(path)):
            layout.ignored.append(name)
        else:
            layout.left_out.append(
                LeftOut(name, "not_an_image", f"neither {', '.join(SUFFIXES)} nor DICOM")
            )
    return images


def is_beside(path: Path) -> bool:
    """Whether a file is named as the voxels of a header that lies beside it."""
    return path.name.lower().endswith(BESIDE)


def leave_out(root: Path, files: list[Path], layout: Layout, code: str, detail: str) -> None:
    """Books files that a layout has no use for: images under a code, all others as `sort_out`."""
    for path in sort_out(root, files, layout):
        layout.left_out.append(LeftOut(path.relative_to(root).as_posix(), code, detail))


def _is_side_file(path: Path) -> bool:
    lower = path.name.lower()
    return lower.endswith(SIDE_SUFFIXES) or lower.split(".")[0] in SIDE_NAMES
