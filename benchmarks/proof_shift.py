"""Where the scans are not as those that were learnt from: the networks of the proof's primary cell.

    python benchmarks/proof_shift.py --work DIR [--jobs 2]

`--work` is the folder of benchmarks/proof.py after its stage test-hippocampus-2, whose networks are
taken as they are: validation subjects, no test subject and no training. Each scan is seen

plain      as it is, at 1 mm
blurred    at half its resolution: means over 2 mm, brought back to 1 mm linearly
coarse     with voxels of 1.5 mm, which the network takes for what it knows; classes are brought
           back linearly before one is chosen

and scored against the same labels. Rows are kept as docs/results/proof/shift-NAME.tar.xz.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from proof import PRIMARY, keep
from torch.nn.functional import interpolate

from data_prep.corpus import Corpus
from data_prep.preprocess import Preprocess, as_physical
from data_prep.volume import Volume
from finetune.evaluate import Origin, Seen, choose_split, score
from finetune.model_file import load_network
from finetune.rows import read_rows, write_rows
from finetune.segmenter import Segmenter

Look = Callable[[Segmenter, Volume], NDArray[np.uint8]]
HALF, COARSE_MM = 0.5, (1.5, 1.5, 1.5)


def plain(network: Segmenter, volume: Volume) -> NDArray[np.uint8]:
    """Classes of a scan as it is."""
    return network.segment(volume)


def blurred(network: Segmenter, volume: Volume) -> NDArray[np.uint8]:
    """Classes of a scan at half its resolution."""
    known = as_physical(volume)
    image = torch.from_numpy(known.array)[None]
    low = interpolate(image, scale_factor=HALF, mode="area")
    back = interpolate(low, size=image.shape[2:], mode="trilinear", align_corners=False)
    return network.segment(replace(known, array=back[0].numpy(), statistics=None))


def coarse(network: Segmenter, volume: Volume) -> NDArray[np.uint8]:
    """Classes of a scan of larger voxels, on the grid of the scan as it was."""
    return replace(network, preprocess=Preprocess.default(COARSE_MM)).segment(volume)


SHIFTS: dict[str, Look] = {"plain": plain, "blurred": blurred, "coarse": coarse}


def score_run(run: Path) -> None:
    """The rows of a run under each shift, once."""
    torch.set_num_threads(1)
    outputs = {name: shifted(run.parent.parent, name) / run.name for name in SHIFTS}
    if all((output / "rows.csv").exists() for output in outputs.values()):
        return
    row = read_rows(run / "rows.csv")[0]
    # Validation subjects are kept out of pretraining as test subjects are.
    whose = {one.name: getattr(row, one.name) for one in fields(Origin) if one.name != "seen"}
    origin = Origin(**whose, seen=Seen())
    corpus = Corpus.open(Path(json.loads((run / "config.json").read_text())["corpus"]))
    split = choose_split(corpus, "official", "validation")
    network = load_network(run, "cpu")
    assert isinstance(network, Segmenter)
    for name, look in SHIFTS.items():
        outputs[name].mkdir(parents=True, exist_ok=True)
        read = partial(labels_of, network, look, corpus)
        rows = score(corpus, split, network.task, read, origin)
        write_rows(rows, outputs[name] / "rows.csv")


def labels_of(network: Segmenter, look: Look, corpus: Corpus, key: str) -> NDArray[np.uint8]:
    """What a network says of a case under a shift."""
    return network.label_values(look(network, corpus.volume(corpus.position(key))))


def shifted(work: Path, name: str) -> Path:
    """The folder of rows under a shift."""
    return work / f"shift-{name}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=2)
    chosen = parser.parse_args()
    work = chosen.work.resolve()
    runs = [rows.parent for rows in sorted((work / f"test-{PRIMARY}").glob("*/rows.csv"))]
    with ProcessPoolExecutor(chosen.jobs) as pool:
        list(pool.map(score_run, runs))
    for name in SHIFTS:
        keep(shifted(work, name))


if __name__ == "__main__":
    main()
