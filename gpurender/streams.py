"""Work on a stream of its own, handed over to torch's current one."""

from collections.abc import Iterable

import torch
from torch import Tensor


def hand_over(tensors: Iterable[Tensor], stream: torch.cuda.Stream | None) -> None:
    """Let the current stream wait for tensors made on another; their memory is not given out while it reads them.

    The host waits for nothing. Without a stream, on a CPU, there is nothing to do.
    """
    if stream is None:
        return
    current = torch.cuda.current_stream(stream.device)
    current.wait_stream(stream)
    for tensor in tensors:
        tensor.record_stream(current)
