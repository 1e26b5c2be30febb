"""A JSON file of a run that is damaged is named by whoever reads it, with what is in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from arm_rows import make_rows

from data_prep.errors import InputError
from data_prep.files import read_table, write_json
from finetune.describe import describe
from finetune.facts import read_run
from finetune.lines import Table
from finetune.model_file import read_model_file
from finetune.report import make_report
from finetune.rows import write_rows
from pretrain.run_folder import RunFolder

READERS: dict[str, Callable[[Path], object]] = {
    "model.json": read_model_file,
    "run.json": lambda run: read_run(run / "rows.csv"),
    "config.json": lambda run: make_report([], [run], Table(()), run / "report.html"),
}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "cannot be read (Expecting property name"),
        ("[1, 2]", "holds [1, 2], expected a table of names and values"),
        ("[" * 100_000, "cannot be read (maximum recursion"),
        (None, "cannot be read (No such file or directory)"),
    ],
)
def test_what_is_no_table_is_named(text: str | None, said: str, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(InputError) as caught:
        read_table(file)
    (problem,) = caught.value.problems
    assert problem.startswith(f"{file}: {said}") and "restore it" in problem


@pytest.mark.parametrize("text", ["{", "[1, 2]"])
@pytest.mark.parametrize("name", READERS)
def test_each_reader_says_so(name: str, text: str, tmp_path: Path) -> None:
    for other in ("run.json", "config.json"):
        write_json(tmp_path / other, {"objective": {}})
    write_rows(make_rows("scratch", seeds=1), tmp_path / "rows.csv")
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=rf"{name}: (cannot be read|holds \[1, 2\])"):
        READERS[name](tmp_path)
    if name != "model.json":
        for read in (describe, lambda run: RunFolder(run).pretraining()):
            with pytest.raises(InputError, match=rf"{name}: (cannot be read|holds \[1, 2\])"):
                read(tmp_path)
