"""CUDA graphs: a GPU's launches, recorded once and replayed from the same memory."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

CAPTURING = threading.Lock()  # a capture begins by waiting for the whole GPU, which another capture must not be in


def captured(launch: Callable[[int], None], device: torch.device) -> Callable[[], None]:
    """Capture a launch in a CUDA graph without running it; what is returned runs it, on torch's current stream.

    Args:
        launch: is given the stream to launch on, torch's current one meanwhile, by its handle.
    """
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream(device)
    # "thread_local": other threads' copies and allocations go on meanwhile
    with CAPTURING, torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        launch(stream.cuda_stream)
    return graph.replay


class Turns:
    """Memory that is one call's, of any thread and stream, until what that call put on its stream is done."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._done = torch.cuda.Event() if device.type == "cuda" else None

    @contextmanager
    def taken(self) -> Iterator[None]:
        if self._done is None:
            with self._lock:
                yield
            return
        with self._lock, torch.cuda.device(self._device):
            self._done.wait()  # on the current stream; the host goes on
            try:
                yield
            finally:
                self._done.record()
