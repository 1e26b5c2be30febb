from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from arm_rows import make_rows

from data_prep.errors import InputError
from finetune.formats import make_table
from finetune.lines import Line
from finetune.rows import Row, write_rows
from finetune.table import read_table
from voxelith import main


def write_run(
    folder: Path, rows: list[Row], labels: Sequence[Sequence[int]] = ((1,), (2,))
) -> Path:
    folder.mkdir(parents=True)
    write_rows(rows, folder / "rows.csv")
    names = ("anterior", "posterior")
    classes = [{"name": n, "values": list(v)} for n, v in zip(names, labels, strict=True)]
    task = {"classes": classes, "regions": []}
    (folder / "run.json").write_text(json.dumps({"recipe": {"task": task}}))
    return folder


def summary(
    cases: int = 12, first: str = "1", second: str = "2"
) -> dict[str, list[dict[str, object]]]:
    """As nnU-Net v2 writes it: Dice of case k is 0.5 + 0.01 k in front and 0.1 more behind.

    Each class has 500 voxels of truth, and 1.1 ml in the rows.
    """
    return {
        "metric_per_case": [
            {
                "prediction_file": f"/results/fold_0/validation/c{k}.nii.gz",
                "reference_file": f"/raw/labelsTr/c{k}.nii.gz",
                "metrics": {
                    first: {"Dice": 0.5 + 0.01 * k, "n_ref": 500, "n_pred": 400},
                    second: {"Dice": 0.6 + 0.01 * k, "n_ref": 500, "n_pred": 400},
                },
            }
            for k in range(cases)
        ]
    }


def write(path: Path, told: object) -> Path:
    path.write_text(json.dumps(told))
    return path


def dice_line(run: Path, anchor: Path, name: str = "mean") -> Line:
    lines = read_table([run], str(anchor)).groups[0].lines
    return next(line for line in lines if line.metric == "dsc" and line.class_name == name)


ARMS = make_rows("scratch") + make_rows("pretrained", 0.05)


def test_the_anchor_is_averaged_as_the_arms_are(tmp_path: Path) -> None:
    """Classes of a case, then cases of a subject, then subjects: by hand."""
    run = write_run(tmp_path / "run", [replace(r, subject="s" + "01"[r.case > "c1"]) for r in ARMS])
    file = write(tmp_path / "summary.json", summary())
    one = [k for k in range(12) if f"c{k}" <= "c1"]  # c0 and c1
    means = [sum(55 + k for k in group) / len(group) for group in (one, range(2, 12))]
    assert len(one) == 2
    found = dice_line(run, file).anchor
    assert found is not None and found.mean == pytest.approx(sum(means) / 2)
    assert (found.cases, found.units, found.draws, found.has_interval) == (12, 2, 1, False)
    front = dice_line(run, file, "anterior").anchor
    assert front is not None and front.mean == pytest.approx(sum(means) / 2 - 5)


def test_what_is_absent_is_not_averaged(tmp_path: Path) -> None:
    def absent(row: Row) -> Row:
        if (row.case, row.class_name) != ("c0", "posterior"):
            return row
        return replace(row, outcome="true_negative", dsc=math.nan, volume_true_ml=0.0)

    run = write_run(tmp_path / "run", [absent(r) for r in ARMS])
    told = summary()
    told["metric_per_case"][0]["metrics"]["2"] = {"Dice": math.nan, "n_ref": 0}
    file = write(tmp_path / "summary.json", told)
    found = dice_line(run, file).anchor
    # Case 0 has its anterior part alone, 50 instead of 55.
    assert found is not None and found.mean == pytest.approx(55 + 5.5 - 5 / 12)
    behind = dice_line(run, file, "posterior").anchor
    assert behind is not None and behind.cases == 11


def test_cases_that_a_checkpoint_has_seen_do_not_count_for_the_anchor(tmp_path: Path) -> None:
    seen = [
        replace(r, status="tainted") if (r.case, r.arm) == ("c11", "pretrained") else r
        for r in ARMS
    ]
    run = write_run(tmp_path / "run", seen)
    file = write(tmp_path / "summary.json", summary(14))
    group = read_table([run], str(file)).groups[0]
    assert group.main.anchor is not None and group.main.anchor.cases == 11
    assert "nnU-Net: 2 cases of summary.json are no test cases, left out" in group.notes


def test_the_anchor_is_about_the_cases_of_the_difference(tmp_path: Path) -> None:
    rows = [r for r in ARMS if (r.case, r.arm, r.seed) != ("c11", "pretrained", 2)]
    line = dice_line(write_run(tmp_path / "run", rows), write(tmp_path / "s.json", summary()))
    assert line.difference is not None and line.anchor is not None and line.scratch is not None
    assert line.anchor.cases == line.difference.cases == 11 and line.scratch.cases == 12


def test_labels_are_matched_by_their_values(tmp_path: Path) -> None:
    """The class in front has values 3 and 4: a region of nnU-Net, in any order."""
    run = write_run(tmp_path / "run", ARMS, labels=((4, 3), (1,)))
    file = write(tmp_path / "summary.json", summary(first="(3, 4)", second="1"))
    front = dice_line(run, file, "anterior").anchor
    assert front is not None and front.mean == pytest.approx(55.5)


def test_an_anchor_that_does_not_fit_is_refused_with_what_is_wrong(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", ARMS)
    file = tmp_path / "summary.json"
    write(file, summary(10))
    with pytest.raises(InputError, match=r"lacks 2 of 12 test cases \(c10, c11\)"):
        read_table([run], str(file))
    write(file, summary(second="3"))
    with pytest.raises(InputError, match=r"lacks 1 of 2 classes \(posterior\).* has labels 1, 3"):
        read_table([run], str(file))
    other = summary()
    other["metric_per_case"][3]["metrics"]["2"]["n_ref"] = 600
    write(file, other)
    with pytest.raises(InputError, match=r"another truth than the runs in 1 of 12 cases \(c3\)"):
        read_table([run], str(file))
    write(file, {"metric_per_case": summary()["metric_per_case"] * 2})
    with pytest.raises(InputError, match="has case c0 twice"):
        read_table([run], str(file))
    write(file, {"results": {"all": []}})  # nnU-Net v1
    with pytest.raises(InputError, match=r"is no summary\.json of nnU-Net v2"):
        read_table([run], str(file))
    with pytest.raises(InputError, match="cannot be read"):
        read_table([run], str(tmp_path / "nothing.json"))


def test_several_data_sets_say_whose_an_anchor_is(tmp_path: Path) -> None:
    file = write(tmp_path / "summary.json", summary())
    runs = [
        write_run(tmp_path / name, [replace(r, dataset=name) for r in ARMS])
        for name in ("first", "second")
    ]
    with pytest.raises(InputError, match=r"does not say whose.*first, second.*NAME:FILE"):
        read_table(runs, str(file))
    with pytest.raises(InputError, match="no run has data set frist; did you mean first"):
        read_table(runs, f"frist:{file}")
    with pytest.raises(InputError, match="two files for first"):
        read_table(runs, f"first:{file},first:{file}")
    found = {g.dataset: g.main.anchor for g in read_table(runs, f"first:{file}").groups}
    assert found["first"] is not None and found["second"] is None


def test_the_column_is_in_every_format_and_only_where_asked_for(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", ARMS)
    file = write(tmp_path / "summary.json", summary())
    out = tmp_path / "table"
    assert main(["table", str(run), f"anchor={file}", f"output={out}"]) == 0
    for name in ("table.md", "table.html", "table.tex"):
        text = (out / name).read_text()
        assert "nnU-Net" in text and "60.5" in text, name
    with (out / "table.csv").open() as opened:
        records = list(csv.DictReader(opened))
    assert [r["anchor_mean"] for r in records[:3]] == ["60.5", "55.5", "65.5"]
    assert {r["anchor_mean"] for r in records if r["metric"] != "dsc"} == {""}
    make_table([run], out)
    for name in ("table.md", "table.html", "table.tex"):
        assert "nnU-Net" not in (out / name).read_text()
