r"""The picture of the whole line in the README, made of what the line itself has made.

    python benchmarks/line_picture.py --pretraining RUN --finetuning RUN --table table.json \
        --encoder 'NAME-{0,1,2}' OUT.png

From left to right: scans of the corpus that RUN was pretrained on; one of them with hidden blocks,
and as the run rebuilds it; the colours of the encoder's features (three principal components); a
test case as the finetuned RUN segments it, with the truth as a dashed line; and Dice of the
encoder and of scratch by labels out of the table.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import nibabel as nib
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from data_prep.corpus import Corpus
from data_prep.pictures import middle_slice
from finetune.figures import ARM_COLOURS, CLASS_COLOURS, FAINT, INK, STYLE
from pretrain.loader import collate, to_batch
from pretrain.previews import HIDDEN
from pretrain.run_folder import RunFolder
from pretrain.settings import PretrainSettings
from pretrain.strip import fine_map
from pretrain.train import load_trained, make_dataset

TITLES = ("raw CT and MRI", "pretraining: rebuild\nwhat is hidden", "features",
          "finetuning", "what it was worth")  # fmt: skip
COMMANDS = ("voxelith prep", "voxelith pretrain", "voxelith features",
            "voxelith finetune", "voxelith table")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("--pretraining", type=Path, required=True)
    parser.add_argument("--finetuning", type=Path, required=True)
    parser.add_argument("--table", type=Path, required=True)
    parser.add_argument("--encoder", required=True, help="as the table calls it")
    parser.add_argument("--case", type=int, default=0, help="which of the predictions")
    chosen = parser.parse_args()
    run = RunFolder(chosen.pretraining)
    corpus = Corpus.open(Path(run.config()["corpus"]))
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(12.4, 3.1))
        columns = figure.add_gridspec(
            1, 5, width_ratios=[1.15, 1.15, 0.62, 0.85, 1.35], left=0.008, right=0.992, top=0.80,
            bottom=0.22, wspace=0.2,
        )  # fmt: skip
        scans(figure, columns[0], corpus)
        crop = learning(figure, columns[1], run, corpus)
        colours(figure.add_subplot(columns[2]), run, crop)
        segmented(figure.add_subplot(columns[3]), chosen.finetuning, chosen.case)
        table = json.loads(chosen.table.read_text())
        lines = [g["lines"][0] for g in table["groups"] if g["checkpoint"] == chosen.encoder]
        worth(figure.add_subplot(columns[4]), lines)
        for column, title, command in zip(range(5), TITLES, COMMANDS, strict=True):
            box = columns[column].get_position(figure)
            middle = (box.x0 + box.x1) / 2
            figure.text(middle, 0.985, title, ha="center", va="top", weight="bold", size=11)
            figure.text(middle, 0.02, command, ha="center", family="monospace", size=9, color=INK)
            if column < 4:
                figure.text(box.x1 + 0.010, 0.49, "→", ha="center", size=17, color=FAINT)
        figure.savefig(chosen.output, dpi=160)


def scans(figure: Figure, place: Any, corpus: Corpus) -> None:
    """Six scans of the corpus, of as many sources."""
    seen: dict[str, int] = {}
    for i, key in enumerate(corpus.keys):
        seen.setdefault(str(corpus.meta(i).get("source") or key), i)
    order = sorted(seen.values(), key=lambda i: -min(corpus.shapes[i][1:]))[:6]
    for inner, i in zip(place.subgridspec(2, 3, wspace=0.06, hspace=0.06), order, strict=False):
        axis = figure.add_subplot(inner)
        axis.imshow(squared(middle_slice(corpus, i)), cmap="gray", vmin=0, vmax=1)
        axis.set_axis_off()


def learning(figure: Figure, place: Any, run: RunFolder, corpus: Corpus) -> torch.Tensor:
    """A crop with hidden blocks, and rebuilt."""
    objective, _, _ = load_trained(run)
    objective.eval()
    data = make_dataset(PretrainSettings.model_validate(run.config()), corpus)
    # A hippocampus: the middle of it is seen by a crop as a whole.
    item = next(i for i in range(len(corpus)) if "hippocampus" in corpus.keys[i])
    batch = to_batch(collate([data.middle(item)]))
    shown = objective.preview(batch)
    shades = plt.get_cmap("gray").with_extremes(bad=HIDDEN)
    low, high = np.percentile(batch.image[0, 0].numpy(), [0.5, 99.5])
    sides = place.subgridspec(1, 2, wspace=0.08)
    for inner, name in zip(sides, ("visible", "output"), strict=True):
        axis = figure.add_subplot(inner)
        volume = shown[name][0, 0].float().numpy()
        axis.imshow(volume[volume.shape[0] // 2], cmap=shades, vmin=low, vmax=high)
        axis.set_axis_off()
    return batch.image[:1]


def colours(axis: Axes, run: RunFolder, crop: torch.Tensor) -> None:
    """Three principal components of the features of the crop."""
    objective, _, _ = load_trained(run)
    encoder = objective.released.eval()
    with torch.no_grad():
        found, _ = fine_map(encoder, crop, len(encoder.strides) - 2)
    tokens = found[0].flatten(1).T.numpy()
    tokens = tokens - tokens.mean(0)
    _, _, directions = np.linalg.svd(tokens, full_matrices=False)
    parts = (tokens @ directions[:3].T).reshape(*found.shape[2:], 3)
    low, high = np.percentile(parts, [2, 98], axis=(0, 1, 2))
    picture = np.clip((parts - low) / (high - low), 0, 1)
    axis.imshow(picture[picture.shape[0] // 2], interpolation="nearest")
    axis.set_axis_off()


def segmented(axis: Axes, run: Path, case: int) -> None:
    """A test case with its predicted and true outlines."""
    prediction = sorted((run / "predictions").glob("*.nii.gz"))[case]
    corpus = Corpus.open(Path(json.loads((run / "config.json").read_text())["corpus"]))
    i = corpus.position(prediction.name.removesuffix(".nii.gz"))
    truth = corpus.read(i, "seg")
    found = on_grid(prediction, truth.shape)
    d = int(np.argmax((truth > 0).sum((1, 2))))
    image = corpus.read(i, "image")[0].astype(float)[d]
    axis.imshow(image, cmap="gray", vmin=np.percentile(image, 1), vmax=np.percentile(image, 99.5))
    for value in (1, 2):
        colour = CLASS_COLOURS[value - 1]
        axis.contour(found[d] == value, levels=[0.5], colors=[colour], linewidths=1.8)
        axis.contour(truth[d] == value, levels=[0.5], colors="w", linewidths=1.0, linestyles="--")
    axis.set_axis_off()


def on_grid(file: Path, shape: tuple[int, ...]) -> NDArray[Any]:
    """A prediction on the corpus' axes (S, P, L)."""
    image = nib.load(file)
    to_spl = nib.orientations.ornt_transform(
        nib.io_orientation(image.affine), nib.orientations.axcodes2ornt("SPL")
    )
    found = np.asarray(nib.orientations.apply_orientation(np.asarray(image.dataobj), to_spl))
    if found.shape != tuple(shape):
        raise SystemExit(f"{file}: has {found.shape} voxels, its scan {tuple(shape)}")
    return found


def worth(axis: Axes, mains: Sequence[dict[str, Any]]) -> None:
    """Dice of both arms by labels, with 95 % intervals."""
    counts = sorted({line["n_labels"] for line in mains})
    for arm, shift, style in (("scratch", -0.04, "s--"), ("pretrained", 0.04, "o-")):
        found = {line["n_labels"]: line[arm] for line in mains if line[arm]}
        x = [counts.index(n) + shift for n in sorted(found)]
        y = [found[n]["mean"] for n in sorted(found)]
        spread = [[found[n]["mean"] - found[n]["low"] for n in sorted(found)],
                  [found[n]["high"] - found[n]["mean"] for n in sorted(found)]]  # fmt: skip
        axis.errorbar(x, y, spread, fmt=style, color=ARM_COLOURS[arm], ms=5, lw=1.6, capsize=2.5,
                      label=arm)  # fmt: skip
    axis.set_xticks(range(len(counts)), [str(n) for n in counts])
    axis.set_xlim(-0.6, len(counts) - 0.4)
    axis.set_xlabel("labelled cases", labelpad=1)
    axis.text(0.04, 0.93, "Dice", transform=axis.transAxes, color=INK)
    axis.legend(loc="lower right")


def squared(picture: NDArray[Any]) -> NDArray[Any]:
    """The middle of a picture, as wide as high."""
    side = min(picture.shape)
    top, left = ((n - side) // 2 for n in picture.shape)
    return picture[top : top + side, left : left + side]


if __name__ == "__main__":
    main()
