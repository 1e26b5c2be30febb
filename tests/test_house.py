"""The house rules that a machine can check."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = ["data_prep", "pretrain", "finetune"]
# What finetune may use of pretrain.
DOORS = {
    "adopt",
    "arguments",
    "augment",
    "backbones",
    "costs",
    "decoders",
    "device",
    "encoder",
    "estimate",
    "events",
    "export",
    "fetch",
    "foreign",
    "forms",
    "loader",
    "loop",
    "losses",
    "manifest",
    "numerics",
    "objective",
    "preemption",
    "previews",
    "probe",
    "registry",
    "release",
    "run_folder",
    "schedule",
    "settings",
    "tracking",
    "train",
}


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("package", ORDER)
def test_imports_go_one_way(package: str) -> None:
    later = ORDER[ORDER.index(package) + 1 :]
    for file in (ROOT / package).rglob("*.py"):
        wrong = {name for name in imports(file) if name.split(".")[0] in later}
        assert not wrong, f"{file.relative_to(ROOT)} imports {wrong}"


def test_data_prep_knows_no_torch() -> None:
    for file in (ROOT / "data_prep").rglob("*.py"):
        assert not {n for n in imports(file) if n.split(".")[0] in ("torch", "lightning", "monai")}


def test_finetune_uses_the_doors_of_pretrain() -> None:
    walls = {door for door in DOORS if not list((ROOT / "pretrain").glob(f"{door}*"))}
    assert not walls, f"doors that lead nowhere: {walls}"
    for file in (ROOT / "finetune").rglob("*.py"):
        used = {name.split(".")[1] for name in imports(file) if name.startswith("pretrain.")}
        assert used <= DOORS, f"{file.name} opens {used - DOORS}"


def test_objectives_know_nothing_of_the_loop() -> None:
    allowed = {
        "backbones",
        "crops",
        "decoders",
        "draws",
        "losses",
        "masking",
        "objective",
        "objectives",
    }
    allowed |= {
        "attention",
        "contrast",
        "distillation",
        "heads",
        "masked_tokens",
        "overlap",
        "ramps",
    }
    allowed |= {"projection", "regularisers", "teacher"}
    for file in (ROOT / "pretrain" / "objectives").glob("*.py"):
        used = {name.split(".")[1] for name in imports(file) if name.startswith("pretrain.")}
        assert used <= allowed, f"{file.name} imports {used - allowed}"


def test_collectives_go_through_one_module() -> None:
    """Lightning's own aside: where ranks wait for each other is seen in one file."""
    speaking = {
        str(file.relative_to(ROOT))
        for package in ORDER
        for file in (ROOT / package).rglob("*.py")
        if any(name.startswith("torch.distributed") for name in imports(file))
    }
    assert speaking == {"pretrain/collectives.py"}


def test_nothing_is_unpickled_or_evaluated() -> None:
    folders = (ROOT / package for package in [*ORDER, "conf", "slurm"])
    for file in [ROOT / "voxelith.py", *(f for folder in folders for f in folder.rglob("*.py"))]:
        roots = {name.split(".")[0] for name in imports(file)}
        assert not roots & {"pickle", "dill", "cloudpickle", "shelve", "marshal"}, file
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert called not in ("eval", "exec"), file
                assert keywords.get("allow_pickle", "False") == "False", file
                if called == "torch.load":
                    assert keywords.get("weights_only") == "True", file


def test_importing_voxelith_stays_light() -> None:
    code = "import sys, voxelith; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ["False", "False"], done.stderr


def test_features_need_no_trainer() -> None:
    """Whoever only wants features does not wait for Lightning, Hydra or MONAI."""
    code = (
        "import sys, pretrain.encoder\n"
        "print([m for m in ('lightning', 'hydra', 'monai', 'wandb') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_table_and_its_pictures_start_without_torch() -> None:
    code = "import sys, finetune.formats, finetune.figures; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "False", done.stderr


def test_prep_starts_without_torch() -> None:
    """Settings that name no class are checked without importing what could be named."""
    code = (
        "import sys; from conf.compose import settings_for\n"
        "settings_for('prep', ['input=a', 'output=b'])\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "False", done.stderr
