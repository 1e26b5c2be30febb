"""Scratch at its own best where another recipe's twin was trained just so: the same run once.

Of several pretrained recipes one may do best at the rate that is best for scratch. Its twins are
then what the third arm of each other recipe would train, seed for seed, and a sweep's most common
waste. A finished one beside the run gives its network and its answers; they are scored under the
name of the arm, and run.json says whose they are.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from data_prep.files import atomic, atomic_folder, read_note, write_json
from finetune.answers import ANSWERS
from finetune.metrics import METRIC_VERSION
from finetune.plan import Plan
from finetune.rows import are_current
from pretrain.run_folder import RunFolder, versions

ANSWERED = (ANSWERS, "predictions")
"""What a run answers, by the kind of its task."""
TAKEN = (
    "step_zero.json", "metrics.csv", "metrics.jsonl", "validation.csv", "model.json",
    "model.safetensors", *ANSWERED,
)  # fmt: skip


def trained_alike(plan: Plan, device: str) -> Path | None:
    """The finished run beside this one that was trained and tested as it would be, if any.

    Args:
        plan: of this run.
        device: that it would be trained on, as costs name it.
    """
    settings = plan.settings
    # Ranks that look at different moments could come to different answers, and wait for ever.
    if settings.recipe_of == "twin" or settings.ranks > 1:
        return None
    wanted = {
        **_without_shared(plan.identity),
        "versions": versions(),
        # What no recipe holds, and rounds: `auto` is another precision on another device.
        "trainer": settings.trainer.model_dump(mode="json"),
        "device": device,
        "validations": settings.validations,
    }
    for rows in sorted(settings.runs.glob("*/rows.csv")):
        run = rows.parent
        facts, config = (read_note(run / name) for name in ("run.json", "config.json"))
        found = {
            **_without_shared(facts.get("identity", {})),
            "versions": facts.get("versions"),
            "trainer": config.get("trainer"),
            "device": facts.get("cost", {}).get("device"),
            "validations": config.get("validations"),
        }
        if found == wanted and are_current(rows, METRIC_VERSION) and _is_whole(run, plan):
            return run
    return None


def take_over(alike: Path, run: RunFolder) -> None:
    """Copies what training and testing gave, and what they cost; the rows are made from it."""
    for name in TAKEN:
        there, here = alike / name, run.path / name
        if there.is_dir():
            shutil.rmtree(here, ignore_errors=True)
            with atomic_folder(here) as folder:
                shutil.copytree(there, folder, dirs_exist_ok=True)
        elif there.exists():
            with there.open("rb") as source, atomic(here) as target:
                shutil.copyfileobj(source, target)
    told = read_note(alike / "run.json")
    taken = {name: told[name] for name in ("cost", "precisions") if name in told}
    facts = read_note(run.path / "run.json") | taken | {"trained_in": alike.name}
    write_json(run.path / "run.json", facts)
    shutil.rmtree(run.checkpoints.folder, ignore_errors=True)


def _without_shared(identity: dict[str, Any]) -> dict[str, Any]:
    """What a run is, but for the shared recipe that it is compared under."""
    return {name: value for name, value in identity.items() if name != "config_hash"}


def _is_whole(run: Path, plan: Plan) -> bool:
    """Whether the network and all answers are still there: both are large, and may be cleared."""
    answers, labels = (run / name for name in ANSWERED)
    answered = all((labels / f"{key}.nii.gz").exists() for key in plan.test.keys)
    return (run / "model.safetensors").exists() and (answered or answers.exists())
