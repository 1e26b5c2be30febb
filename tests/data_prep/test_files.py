"""Files and folders appear whole, and where another process was faster that is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.errors import InputError
from data_prep.files import atomic_folder


def test_a_place_that_was_taken_meanwhile_is_said_and_left_alone(tmp_path: Path) -> None:
    place = tmp_path / "release"
    with pytest.raises(InputError, match="already exists"), atomic_folder(place) as slow:
        (slow / "a").write_text("slow")
        with atomic_folder(place) as fast:
            (fast / "a").write_text("fast")
    assert (place / "a").read_text() == "fast"
    assert [path.name for path in tmp_path.iterdir()] == ["release"]


def test_an_empty_folder_gives_way(tmp_path: Path) -> None:
    (tmp_path / "release").mkdir()
    with atomic_folder(tmp_path / "release") as folder:
        (folder / "a").write_text("whole")
    assert (tmp_path / "release" / "a").read_text() == "whole"


def test_another_fault_of_the_disk_is_told_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_folder(tmp_path / "release") as folder:
        folder.rmdir()
