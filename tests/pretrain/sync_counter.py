"""Counts where the host would wait for the device, without a device.

A training step queues work and runs ahead; each `.item()`, `.cpu()` or boolean index makes the host
wait until the queue is empty. Meta tensors stand for the device's: they hold no values. Where
somebody asks for one it is noted, with the line that asked; scalars and copies get a made-up answer
so that the step goes on, all else raises.

A copy from the host to the device is noted as well: from memory that is not pinned it waits, and a
constant is better made on the device.
"""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = "meta"
ROOT = Path(__file__).parents[2]
aten = torch.ops.aten

COPIES = (aten._to_copy, aten.copy_, aten.copy)
INDEXING = (
    aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index,
)  # fmt: skip
VALUES = (
    aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.allclose, aten.nonzero,
    aten.masked_select, aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.bincount,
    aten.histc, aten.repeat_interleave,
)  # fmt: skip


class SyncCounter(TorchDispatchMode):
    """Within it, `found` holds one line for each time the host would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._constants = _Constants(self)

    def __enter__(self) -> Self:
        self._constants.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._constants.__exit__(*error)

    def note(self, what: str) -> None:
        """Files a wait under the innermost line that is ours, or the innermost of all."""
        frames = traceback.extract_stack()[:-2]
        # The environment may lie within the repository.
        own = [
            f
            for f in frames
            if Path(f.filename).is_relative_to(ROOT)
            and "site-packages" not in f.filename
            and f.name != "note"
        ]
        last = [f for f in own if Path(f.filename).name != Path(__file__).name][-1:] or frames[-1:]
        self.found.append(f"{what} at {Path(last[0].filename).name}:{last[0].lineno}")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, packet = kwargs or {}, func.overloadpacket
        if packet in COPIES:
            return self._copy(func, args, kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(tensor.device.type == DEVICE for tensor in tensors):
            indices = args[1] if packet in INDEXING else ()
            if any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices):
                self.note("boolean index")
            elif packet in VALUES:
                self.note(str(packet))
                if packet is aten._local_scalar_dense:
                    return torch.ones((), dtype=args[0].dtype).item()
                if packet in (aten.is_nonzero, aten.equal, aten.allclose):
                    return True
        return func(*args, **kwargs)

    def _copy(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if func.overloadpacket is aten._to_copy:
            (source,), target = args, torch.device(kwargs.get("device") or args[0].device)
        else:
            source, target = args[1], args[0].device
        if source.device.type == DEVICE and target.type != DEVICE:
            self.note("copy to the host")
            made = torch.ones(source.shape, dtype=kwargs.get("dtype") or source.dtype)
            return made if func.overloadpacket is aten._to_copy else args[0]
        if source.device.type != DEVICE and target.type == DEVICE:
            self.note("copy to the device")
        return func(*args, **kwargs)


class _Constants(TorchFunctionMode):
    """`torch.tensor(..., device=...)` fills host memory and copies it, unseen by dispatch."""

    def __init__(self, counter: SyncCounter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        made = func in (torch.tensor, torch.as_tensor, torch.asarray)
        if made and device is not None and torch.device(device).type == DEVICE:
            given = args[0] if args else kwargs["data"]
            if not isinstance(given, Tensor):
                self.counter.note(f"torch.{func.__name__}")
        return func(*args, **kwargs)
