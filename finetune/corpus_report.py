"""A corpus on one page: what it holds, what was left out and why, and what it looks like."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt

from data_prep.corpus import Corpus
from data_prep.files import legible, make_folder, read_csv, write_text
from data_prep.licences import strictest_first
from data_prep.naming import DUPLICATES, DUPLICATES_OF_BEFORE, QUARANTINE_FILE, private_folder
from data_prep.pictures import middle_slice
from finetune.figures import ARM_COLOURS, FAINT, STYLE, WIDTH, png, svg
from finetune.pages import data_uri, render

SLICES = 48
MEASURED = 2000
"""Samples whose statistics are drawn, evenly chosen."""
EXAMPLES = 3
_COLOURS = {"CT": ARM_COLOURS["scratch"], "MR": ARM_COLOURS["pretrained"]}


def corpus_report(corpus_path: Path, output: Path) -> Path:
    """Writes the page.

    Names of files are on it where the corpus keeps names, and where the page is written into the
    private folder; elsewhere examples are lines of the quarantine, which its owner can look up.

    Args:
        corpus_path: a corpus on this machine.
        output: a .html file, or a folder that gets report.html.

    Raises:
        InputError: there is no corpus.
        CorruptionError: what is drawn of it is damaged.
    """
    corpus = Corpus.open(corpus_path)
    info = corpus.info
    counts = info["counts"]
    path = output if output.suffix == ".html" else output / "report.html"
    make_folder(path.parent, "output")
    private = private_folder(corpus_path)
    owned = path.resolve().is_relative_to(private.resolve())
    named = owned or info["options"]["keys"] == "names"
    copies = [private / DUPLICATES_OF_BEFORE, *sorted((private / DUPLICATES).glob("*.png"))]
    page = render(
        "corpus.html.j2",
        name=info["name"],
        kind=info["kind"],
        layout=info["layout"],
        numbers=_numbers(corpus),
        files=counts["files"],
        reasons=_reasons(corpus, private, named),
        licences=[(name, counts["licence"][name]) for name in strictest_first(counts["licence"])],
        tables=_tables(corpus),
        shapes=_draw_sizes(corpus),
        intensities=_draw_intensities(corpus),
        slices=data_uri(_draw_slices(corpus), "image/png"),
        copies=[data_uri(one.read_bytes(), "image/png") for one in copies if one.is_file()],
        not_comparable=len(counts.get("not_comparable", [])),
        generations=info["generations"],
        versions=info["versions"],
        index_hash=corpus.index_hash,
    )
    write_text(path, page, mode=0o600 if owned else 0o644)
    return path


def _numbers(corpus: Corpus) -> list[tuple[str, str]]:
    shards = corpus.info["shards"]
    size = sum(shard["bytes"] for shard in shards)
    voxels = float(np.prod(corpus.shapes[:, 1:].astype(np.float64), axis=1).sum()) / 1e6
    return [
        ("Volumes", f"{len(corpus):,}"),
        ("Subjects", f"{len(set(corpus.subjects)):,}"),
        ("Shards", f"{len(shards):,}"),
        ("Size", f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"),
        ("Million voxels", f"{voxels:,.0f}"),
    ]


def _reasons(corpus: Corpus, private: Path, named: bool) -> list[tuple[str, int, list[str]]]:
    """Code, count and examples of what was left out, as far as the private folder is here."""
    examples: dict[str, list[str]] = {}
    for line, row in enumerate(read_csv(private / QUARANTINE_FILE), start=2):
        found = examples.setdefault(row["code"], [])
        if len(found) < EXAMPLES:
            shown = legible(f"{row['input']}: {row['detail']}")
            found.append(shown if named else f"line {line} of {QUARANTINE_FILE}")
    rejected = Counter(corpus.info["counts"]["rejected"])
    return [(code, n, examples.get(code, [])) for code, n in rejected.most_common()]


def _tables(corpus: Corpus) -> list[tuple[str, list[tuple[str, int]]]]:
    """Named counts that are worth a table: what is the same for all is none."""
    told = {
        "Modality": Counter(corpus.modalities),
        "Sequence": Counter(corpus.groups("sequence")),
        "Source": Counter(corpus.groups("source")),
    }
    found = [
        (name, counter.most_common(12))
        for name, counter in told.items()
        if set(counter) != {"unknown"}
    ]
    if corpus.labelled:
        cases = corpus.info["counts"]["cases_by_class"]
        found.append(("Cases with a voxel of", list(cases.items())[:40]))
    return found


def _draw_sizes(corpus: Corpus) -> str:
    spacings = corpus.spacings
    extents = spacings * corpus.shapes[:, 1:]
    kinds = np.array(corpus.modalities)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(3, 3, figsize=(WIDTH, 6.2), layout="constrained")
        for row, values, what, unit in (
            (axes[0], corpus.shapes[:, 1:], "shape", "voxels"),
            (axes[1], spacings, "spacing", "mm"),
            (axes[2], extents, "extent", "mm"),
        ):
            for axis, column, name in zip(row, values.T, ("d", "h", "w"), strict=True):
                bins = np.histogram_bin_edges(column, 24)
                for kind in sorted(set(kinds)):
                    axis.hist(column[kinds == kind], bins, color=_COLOURS.get(kind, FAINT),
                              alpha=0.75, label=kind)  # fmt: skip
                axis.set_title(f"{what} along {name}, {unit}")
        axes[0, 2].legend(loc="upper right")
        return svg(figure)


def _draw_intensities(corpus: Corpus) -> str:
    """Volumes by modality, and their robust ranges, one line each, sorted by their middle."""
    chosen = _evenly(len(corpus), MEASURED)
    channels = [corpus.meta(i)["channels"][0] for i in chosen]
    kinds = sorted({channel["modality"] for channel in channels})
    with plt.rc_context(STYLE):
        figure, (bars, *axes) = plt.subplots(
            1,
            1 + len(kinds),
            figsize=(WIDTH, 2.6),
            layout="constrained",
            width_ratios=[1, *[3] * len(kinds)],
        )
        counts = Counter(corpus.modalities)
        names = sorted(counts)
        bars.bar(names, [counts[n] for n in names], color=[_COLOURS.get(n, FAINT) for n in names])
        bars.set_title("volumes")
        for axis, kind in zip(axes, kinds, strict=True):
            told = [c["statistics"] for c in channels if c["modality"] == kind]
            told.sort(key=lambda one: (one["p50"], one["p99_5"]))
            places = np.arange(len(told))
            low, mid, high = (np.array([one[q] for one in told]) for q in ("p0_5", "p50", "p99_5"))
            axis.vlines(places, low, high, color=_COLOURS.get(kind, FAINT), lw=1, alpha=0.6)
            axis.plot(places, mid, ".", ms=3, color="black")
            if kind != "CT":
                axis.set_yscale("symlog", linthresh=10)
            unit = "HU" if kind == "CT" else "scanner's units"
            axis.set_title(f"{kind}: 0.5 % to 99.5 %, median; {unit}")
            axis.set_xticks([])
        return svg(figure)


def _draw_slices(corpus: Corpus) -> bytes:
    chosen = _evenly(len(corpus), SLICES)
    columns = min(8, len(chosen))
    rows = -(-len(chosen) // columns)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(rows, columns, figsize=(WIDTH, WIDTH / columns * rows),
                                    layout="constrained", squeeze=False)  # fmt: skip
        for axis in axes.flat:
            axis.set_axis_off()
        for axis, i in zip(axes.flat, chosen, strict=False):
            _, h, w = corpus.spacings[i]
            axis.imshow(middle_slice(corpus, i), cmap="gray", vmin=0, vmax=1, aspect=h / w)
            axis.set_title(corpus.keys[i][:18], fontsize=6.5, fontweight="normal")
        return png(figure, dpi=110)


def _evenly(count: int, most: int) -> Sequence[int]:
    return [int(n) for n in np.linspace(0, count - 1, min(count, most)).round()]
