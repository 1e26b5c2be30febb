"""Which device is meant, with a GPU and without."""

from __future__ import annotations

import pytest
import torch

from data_prep.errors import InputError
from pretrain.device import chosen_device


@pytest.mark.parametrize(
    ("wanted", "accelerator", "with_gpu", "without"),
    [
        ("auto", "auto", "cuda", "cpu"),
        ("auto", "gpu", "cuda", "cpu"),
        ("auto", "cuda", "cuda", "cpu"),  # a run of a cluster is replayed on a laptop
        ("auto", "cpu", "cpu", "cpu"),
        ("auto", "mps", "cpu", "cpu"),
        ("cpu", "cuda", "cpu", "cpu"),
        ("cuda", "cpu", "cuda", ""),
    ],
)
def test_a_device_is_the_one_that_was_meant(
    wanted: str, accelerator: str, with_gpu: str, without: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert chosen_device(wanted, accelerator).type == with_gpu
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if without:
        assert chosen_device(wanted, accelerator).type == without
    else:
        with pytest.raises(InputError, match="device=cuda: this machine has no GPU"):
            chosen_device(wanted, accelerator)
