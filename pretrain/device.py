"""Which device a network is on where no trainer decides it."""

from __future__ import annotations

import torch

from data_prep.errors import InputError


def chosen_device(wanted: str, accelerator: str = "auto") -> torch.device:
    """The device that `device=` means on this machine.

    Args:
        wanted: cpu, cuda, or auto: a CUDA GPU where there is one.
        accelerator: of a trainer, by which `auto` goes. Training on mps alone is Lightning's: what
            is looked at beside it is looked at on the CPU.

    Raises:
        InputError: a GPU is wanted, and there is none.
    """
    there = torch.cuda.is_available()
    if wanted == "cuda" and not there:
        raise InputError("device=cuda: this machine has no GPU; take device=auto or device=cpu")
    if wanted == "auto":
        wanted = "cuda" if there and accelerator in ("auto", "gpu", "cuda") else "cpu"
    return torch.device(wanted)
