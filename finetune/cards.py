"""The card of a finetuned network's release: README.md, for who has never seen the run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_prep.licences import UNSTATED, strictest_first
from finetune.answerer import Answerer
from finetune.scan_task import ScanTask
from finetune.segmenter import Segmenter
from finetune.settings import TaskSettings


def card(config: Mapping[str, Any], network: Segmenter | Answerer) -> str:
    """The card; `config` is that of the release."""
    data, training, scores = config["data"], config["training"], config["training"]["scores"]
    licences = strictest_first(data["licence"])
    listed = "\n".join(f"- {name}: {data['licence'][name]} volumes" for name in licences)
    sources = "\n".join(f"| {name} | {count} |" for name, count in data["source"].items())
    task = network.task
    if isinstance(task, ScanTask):
        what = f"A network that answers for whole scans, task `{task.name}` ({task.asks})"
        output, table = "answers/", _answered(task, scores)
    else:
        what, output = f"A segmentation network for the task `{task.name}`", "labels/"
        table = _segmented(task, scores)
    begun = training["began_from"]
    start = f"`{begun['name']}`, digest {begun['digest'][:12]}" if begun else "random weights"
    parameters = sum(p.numel() for p in network.model.parameters())
    doubt = ""
    if scores["tainted"] or scores["unknown"]:
        doubt = (
            f"\nLeft out: {scores['tainted']} cases that pretraining had seen, {scores['unknown']} "
            "of which that is not known.\n"
        )
    return f"""# {config["name"]}

{what}, finetuned by Voxelith.

```
voxelith predict ckpt=path/to/this/folder input=scans/ output={output}
```

**Strictest licence of the training data: {licences[0] if licences else UNSTATED}.**
Whether weights inherit the licence of their data is for you to judge; all of them are below.

| | |
| --- | --- |
| architecture | `{config["backbone"]["name"]}`, {parameters:,} parameters with its decoder |
| begins from | {start} |
| modalities | {", ".join(config["modalities"])} |
| training | {training["steps"]} steps of {training["batch_size"]} crops of \
{config["crop_size"]} voxels on {training["labelled_cases"]} labelled cases, \
seed {training["seed"]} |
| a scan is | seen by windows of {config["crop_size"]} voxels, overlap {network.overlap}, \
{"mirrored too" if network.tta else "not mirrored"}; spacing and intensities as in config.json |

## Scores

{table}
{doubt}
## Data

| source | volumes |
| --- | --- |
{sources}

Licences, strictest first:

{listed}

`fingerprints.json` holds hashes of these volumes, those of pretraining among them.

## Limits

Trained for research; no medical device. On other scanners, protocols and patients than those it was
scored on it may fail without a sign.
"""


def _segmented(task: TaskSettings, scores: Mapping[str, Any]) -> str:
    lines = []
    # A task with regions is scored in those; what is written are its classes.
    for group, written in ((task.classes, True), (task.regions, False)):
        for chosen in group:
            found = scores["classes"].get(chosen.name) if group == task.scored else None
            dice = "none" if not found or found["dice"] is None else f"{100 * found['dice']:.1f}"
            values = ", ".join(map(str, chosen.values))
            lines.append(
                f"| {chosen.values[0] if written else '–'} | {chosen.name} | {values} | {dice} "
                f"| {found['cases'] if found else 0} |"
            )
    table = "\n".join(lines)
    return f"""Dice on the part {scores["part"]} of the labelled corpus. \
One run: one label draw and one start, so there is no interval.

| written | class | label values | Dice | cases |
| --- | --- | --- | --- | --- |
{table}"""


def _answered(task: ScanTask, scores: Mapping[str, Any]) -> str:
    columns = (
        f"the probability of each class: {', '.join(task.classes)}"
        if task.kind == "classification"
        else f"{task.target} in {task.unit}"
    )
    believed = scores["cases"] - scores["tainted"] - scores["unknown"]
    return f"""{scores["score"]} on the part {scores["part"]} of the corpus ({believed} cases). \
One run: one label draw and one start, so there is no interval.

`answers.csv` holds, for each scan, {columns}."""
