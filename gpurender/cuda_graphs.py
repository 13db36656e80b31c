"""CUDA graphs: a GPU's launches, recorded once and replayed from the same memory."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from .cuda import is_out_of_memory
from .errors import DeviceError, first_line

CAPTURES_MAY_FAIL = "2.13"  # before, torch's allocator is as while it captures for good (pytorch #180395)
CAPTURING = threading.Lock()  # a capture begins by waiting for the whole GPU; nobody else may wait for it meanwhile


class CaptureError(DeviceError):
    """A capture failed, and this torch cannot go on after that."""


def captured(launch: Callable[[int], None], device: torch.device) -> Callable[[], None]:
    """Capture a launch in a CUDA graph without running it; what is returned runs it, on torch's current stream.

    Args:
        launch: is given the stream to launch on, torch's current one meanwhile, by its handle.

    Raises:
        CaptureError: it failed, and this torch cannot go on after that; a newer one raises what failed.
    """
    graph = torch.cuda.CUDAGraph()
    # Of another priority than the stages' streams: torch has 32 of each and gives them out in turns, so that a stage
    # could have the same one, and what it launches meanwhile would be recorded instead of done.
    stream, before = torch.cuda.Stream(device, priority=-1), torch.cuda.current_stream(device)
    try:
        # "thread_local": other threads' copies and allocations go on meanwhile
        with CAPTURING, torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            launch(stream.cuda_stream)
    except Exception as error:
        if torch.__version__ < CAPTURES_MAY_FAIL and not is_out_of_memory(error):
            raise CaptureError(
                f"a CUDA graph could not be captured ({first_line(error)}), and torch {torch.__version__} frees no "
                f"memory after that; update torch to {CAPTURES_MAY_FAIL} or newer."
            ) from error
        raise
    finally:  # where a capture fails, torch stays on its stream, for which nobody would wait
        torch.cuda.set_stream(before)
    return graph.replay


def wait_for_all(device: torch.device) -> None:
    """Until a GPU has nothing left to do; not while another thread captures, which would break its capture."""
    with CAPTURING:
        torch.cuda.synchronize(device)


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
