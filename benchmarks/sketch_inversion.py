"""What somebody can draw from a sketch who has scans of the same kind: tried, and measured.

    python benchmarks/sketch_inversion.py SCANS

SCANS is a folder of scans of one kind, one a subject, that lie roughly alike (heads of IXI). Each
in turn is the one whose sketch was published; the attacker has all others with all their
voxels. For each feature of the sketch the attacker takes the most similar neighbourhood of the
other scans and puts it where it lay there, since a sketch holds no places; overlaps are averaged.
Beside it stand the mean of the other scans, for which no sketch is needed, and what could be drawn
if sketches held places. Each is compared with all scans by correlation within the head: how alike
it is to the scan, and of how many scans out of all the right one is the most alike. Writes
docs/results/near_duplicates/inversion.*.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
import torch
from near_duplicates import OUTPUT
from numpy.typing import NDArray
from scipy import ndimage

from data_prep.files import write_json, write_text
from data_prep.request import versions
from data_prep.sketch import _equalised, _sampled, described
from data_prep.volume import read_nifti
from pretrain.bench import machine

GRIDS = (2.0, 4.0)
"""Millimetres; on a finer grid neighbourhoods are smaller, on a coarser one more blurred."""

HALF = 6
"""Points of a grid from the middle of a neighbourhood to its end, as far as a feature looks."""

WAYS = {
    "mean": "the mean of the other scans, without any sketch",
    "sketch": "the sketch, as it is published",
    "places": "the sketch, if it held places",
}
Image = NDArray[np.float32]


class Scan:
    """A scan on one grid, equalised as for its sketch, with features and their places."""

    def __init__(self, path: Path, grid: float, shape: tuple[int, ...] | None = None) -> None:
        volume = read_nifti(path)
        even = _equalised(_sampled(volume.array[0], volume.spacing, grid, None, False))
        assert even is not None
        self.even: Image = even if shape is None else centred(even, shape)
        self.bits, self.places = described(self.even)
        order = np.argsort([bytes(b) for b in self.bits])
        self.bits, self.places = self.bits[order], self.places[order]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scans", type=Path)
    chosen = parser.parse_args()
    paths = sorted(chosen.scans.glob("*.nii*"))
    grids = [tried(paths, grid) for grid in GRIDS]
    result = {
        "scans": len(paths),
        "grids": [{k: v for k, v in one.items() if k != "pictures"} for one in grids],
        "machine": machine(torch.device("cpu")),
        "versions": versions(),
    }
    OUTPUT.mkdir(parents=True, exist_ok=True)
    draw(grids, OUTPUT / "inversion.png")
    write_json(OUTPUT / "inversion.json", result)
    write_text(OUTPUT / "inversion.md", text(result))
    print(text(result))


def centred(image: Image, shape: tuple[int, ...]) -> Image:
    """The image cut or padded evenly to a shape."""
    out = np.zeros(shape, dtype=np.float32)
    here, there = [], []
    for had, wanted in zip(image.shape, shape, strict=True):
        n = min(had, wanted)
        here.append(slice((had - n) // 2, (had - n) // 2 + n))
        there.append(slice((wanted - n) // 2, (wanted - n) // 2 + n))
    out[tuple(there)] = image[tuple(here)]
    return out


def tried(paths: list[Path], grid: float) -> dict[str, Any]:
    """The attack on each scan in turn, on one grid."""
    shape = Scan(paths[0], grid).even.shape
    scans = [Scan(path, grid, shape) for path in paths]
    total = np.sum([scan.even for scan in scans], axis=0)
    head = total > 0.25 * len(scans)
    found: dict[str, list[Any]] = {way: [] for way in WAYS}
    pictures = []
    for n, scan in enumerate(scans):
        others = scans[:n] + scans[n + 1 :]
        mean = (total - scan.even) / len(others)
        drawn = {
            "mean": mean,
            "sketch": put_together(scan, others, mean, own_places=False),
            "places": put_together(scan, others, mean, own_places=True),
        }
        for way, image in drawn.items():
            alike = [correlation(image[head], other.even[head]) for other in scans]
            found[way].append({"own": alike[n], "first": bool(np.argmax(alike) == n)})
        if n < 3:
            pictures.append({"scan": scan.even, **drawn})
    ways = {
        way: {
            "correlation": float(np.mean([one["own"] for one in rows])),
            "spread": float(np.std([one["own"] for one in rows], ddof=1)),
            "most_alike_is_right": int(sum(one["first"] for one in rows)),
        }
        for way, rows in found.items()
    }
    return {"grid_mm": grid, "shape": list(shape), "ways": ways, "pictures": pictures}


def put_together(scan: Scan, others: list[Scan], mean: Image, own_places: bool) -> Image:
    """Neighbourhoods of others that look most like the features, each at a place; else the mean."""
    bits = np.concatenate([other.bits for other in others])
    owner = np.concatenate([np.full(len(o.bits), k) for k, o in enumerate(others)])
    places = np.concatenate([other.places for other in others])
    signs = 2 * np.unpackbits(bits, axis=1).astype(np.float32) - 1
    wanted = 2 * np.unpackbits(scan.bits, axis=1).astype(np.float32) - 1
    best = (wanted @ signs.T).argmax(axis=1)
    window = np.exp(-0.5 * (np.linspace(-1.5, 1.5, 2 * HALF + 1)) ** 2)
    window = window[:, None, None] * window[None, :, None] * window[None, None, :]
    # A little of the mean everywhere, so that it fills what nothing else covers.
    values, weights = 0.02 * mean, np.full_like(mean, 0.02)
    for k, match in enumerate(best):
        source = np.rint(places[match]).astype(int)
        target = np.rint(scan.places[k]).astype(int) if own_places else source
        a = tuple(slice(c - HALF, c + HALF + 1) for c in source)
        b = tuple(slice(c - HALF, c + HALF + 1) for c in target)
        values[b] += window * others[owner[match]].even[a]
        weights[b] += window
    return (values / weights).astype(np.float32)


def correlation(one: Image, other: Image) -> float:
    """Pearson's."""
    return float(np.corrcoef(one, other)[0, 1])


def draw(grids: list[dict[str, Any]], path: Path) -> None:
    """Slices from front to back: the scan, and what each way draws."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    columns: dict[str, Callable[[dict[str, Image]], Image]] = {
        "the scan": lambda p: p["scan"],
        **{name: (lambda p, way=way: p[way]) for way, name in WAYS.items()},
    }
    rows = [(one["grid_mm"], p) for one in grids for p in one["pictures"]]
    figure, axes = pyplot.subplots(len(rows), len(columns), figsize=(11, 2.6 * len(rows)))
    for number, (line, (grid, pictures)) in enumerate(zip(axes, rows, strict=True)):
        for axis, (title, of) in zip(line, columns.items(), strict=True):
            image = of(pictures)
            slab = image[:, :, image.shape[2] // 2]
            axis.imshow(ndimage.zoom(slab[::-1], grid / 2, order=1), cmap="gray", vmin=0, vmax=1)
            axis.set_axis_off()
            if number == 0:
                axis.set_title(fill(title, 26), fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=70)


def text(result: dict[str, Any]) -> str:
    """The result as a table."""
    n = result["scans"]
    rows = [
        f"| {one['grid_mm']:g} mm | {WAYS[way]} "
        f"| {found['correlation']:.3f} ± {found['spread']:.3f} "
        f"| {found['most_alike_is_right']} of {n} |"
        for one in result["grids"]
        for way, found in one["ways"].items()
    ]
    return "\n".join(
        [
            "# What can be drawn from a sketch",
            "",
            f"{n} heads, each in turn the one whose sketch is known, with all others at hand: "
            "correlation with the scan within the head (mean and standard deviation over scans), "
            "and for how many scans the right one is the most alike of all.",
            "",
            "| grid | drawn from | correlation | most alike is the right one |",
            "| --- | --- | --- | --- |",
            *rows,
            "",
            "![the scan, the mean of others, from the sketch, if it held places](inversion.png)",
            "",
            "`python benchmarks/sketch_inversion.py SCANS` writes this page.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
