"""Finds copies of pixels between device and host, and waits of the host for the device.

`watched` sees torch's operations as they are dispatched: it works on fake CUDA tensors, without a GPU. `copied` asks
the GPU's own profiler, which also sees what goes on in other threads and outside torch.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
WAITS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.is_nonzero}
"""What makes the host wait: `.item()`, `.tolist()`, `bool(tensor)` and everything whose shape depends on values."""


@dataclass
class Seen:
    """What was seen: bytes of each copy to another device, by operation; and operations that wait."""

    copies: list[tuple[str, int]] = field(default_factory=list)
    waits: list[str] = field(default_factory=list)


class Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen = Seen()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_gpu = any(tensor.device.type == "cuda" for tensor in given)
        if on_gpu and func.overloadpacket in WAITS:
            self.seen.waits.append(str(func))
        index_by_mask = func.overloadpacket in (aten.index, aten.index_put, aten.index_put_) and any(
            isinstance(leaf, Tensor) and leaf.dtype == torch.bool for leaf in tree_leaves(args[1])
        )
        if on_gpu and index_by_mask:
            self.seen.waits.append(str(func))
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if func.overloadpacket in (aten._to_copy, aten.copy_) and len({t.device.type for t in given + made}) > 1:
            self.seen.copies.append((str(func), made[0].nbytes))
        return result


@contextmanager
def watched() -> Iterator[Seen]:
    """What torch does in this thread."""
    watch = Watch()
    with watch:
        yield watch.seen


def fake(shape: tuple[int, ...], dtype: torch.dtype, mode: FakeTensorMode, device: str = "cuda") -> Tensor:
    """A tensor without memory that says that it is on a GPU."""
    with mode:
        return torch.empty(shape, dtype=dtype, device=device)


def copied(work: Callable[[], object], trace: Path) -> dict[str, list[int]]:
    """Bytes of each copy that the GPU made during some work, by kind: `HtoD`, `DtoH`; needs a GPU."""
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        work()
        torch.cuda.synchronize()
    profiler.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    copies: dict[str, list[int]] = {"HtoD": [], "DtoH": []}
    for event in events:
        for kind, sizes in copies.items():
            if f"Memcpy {kind}" in event.get("name", ""):
                sizes.append(int(event["args"]["bytes"]))
    return copies
