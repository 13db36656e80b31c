"""TensorRT: runs ONNX networks on NVIDIA GPUs, each half as a plan that is built once for the GPU and kept."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from onnx import ModelProto, TensorProto
from torch import Tensor

from .cuda import ordinary_tensors
from .cuda_graphs import CaptureError, Turns, captured
from .engine import NO_FIRST_HALF
from .errors import first_line
from .halves import Halves
from .network import Encoded, Mode
from .tensorrt_build import PlanError
from .tensorrt_plan import Context, Plan

# Launches are replayed from a CUDA graph, so that a larger batch saves nothing there; and in half precision the largest
# tensor is 26 MB a frame, so that 16 frames are beyond any cache as it is, and 0.4 GB.
BATCH = 16
TYPES: dict[int, torch.dtype] = {TensorProto.FLOAT: torch.float32, TensorProto.FLOAT16: torch.float16}


class TensorRtEngine:
    """Two plans, and torch tensors in the GPU's memory: nothing but the assembly of batches is copied."""

    name = "tensorrt"

    @ordinary_tensors()
    def __init__(
        self,
        halves: Halves,
        load: Callable[[str, ModelProto], Plan],
        device: torch.device,
        batch: int,
    ) -> None:
        """
        Args:
            halves: of the precision that it is to run in.
            load: makes a plan of the "encoder" and of the "decoder", such as `PlanLoader`.
            batch: the most frames at a time, unless the network takes one batch only.
        """
        self.precision = "fp16" if halves.float16 else "fp32"
        self.measured_psnr_db: dict[str, float] = {}
        self.notes: list[str] = [] if halves.encoder else [NO_FIRST_HALF]
        self.mode: Mode = halves.mode
        self.device = device
        self.batch = halves.batch or batch

        def runner(name: str, half: ModelProto) -> Runner:
            return Runner(load(name, half), half, device, self.batch, halves.batch is not None, self.notes)

        self._again = halves.again
        self._dtype = TYPES[halves.decoder.graph.input[0].type.tensor_type.elem_type]
        self._encoder = runner("encoder", halves.encoder) if halves.encoder else None
        self._decoder = runner("decoder", halves.decoder)

    @ordinary_tensors()
    def encode(self, faces: Tensor) -> list[Encoded]:
        encoded: list[Encoded] = []
        for some in faces.split(self.batch):
            face = [some.to(self._dtype)] if self._again else []
            levels = self._encoder(len(some), some) if self._encoder else []
            encoded.extend(zip(*face, *levels, strict=True))
        return encoded

    @ordinary_tensors()
    def decode(self, encoded: Sequence[Encoded], audio: Tensor) -> Tensor:
        pictures = []
        for start in range(0, len(encoded), self.batch):
            some = encoded[start : start + self.batch]
            heard = audio[start : start + self.batch]
            pictures.extend(self._decoder(len(some), *zip(*some, strict=True), heard, dtype=torch.float32))
        return pictures[0] if len(pictures) == 1 else torch.cat(pictures)

    def begin(self, encoded: Sequence[Encoded], audio: Tensor) -> Callable[[], Tensor]:
        pictures = self.decode(encoded, audio)  # a GPU works on; whoever reads them waits on its stream
        return lambda: pictures


class Runner:
    """Runs one plan from static memory, for any thread and stream, one call after another.

    Full batches are replayed from a CUDA graph, which holds its context's memory and addresses; others have a context
    of their own, made when the first of them comes, so that the graph stays what it is.
    """

    def __init__(
        self, plan: Plan, half: ModelProto, device: torch.device, rows: int, whole: bool, notes: list[str]
    ) -> None:
        """
        Args:
            rows: frames at most.
            whole: always run `rows` frames; where fewer are given, the others are padding that nobody reads.
            notes: is told of what does not work.
        """
        self._plan = plan
        self._device = device
        self._rows = rows
        self._whole = whole
        self._notes = notes
        self._turns = Turns(device)
        with self._turns.taken():  # calls on other streams wait until they are filled
            self._inputs = {value.name: buffer(value, rows, device) for value in half.graph.input}
            self._outputs = {value.name: buffer(value, rows, device) for value in half.graph.output}
        full = self._context(often=True)
        if full is None:
            raise plan.error()
        self._full = full
        self._shape(full, rows)
        self._ragged: Context | None = None
        self._ragged_rows = 0
        self._ran = False
        self._replay: Callable[[], None] | None = None
        self._graphs = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(
        self, frames: int, *inputs: Tensor | Sequence[Tensor], dtype: torch.dtype | None = None
    ) -> list[Tensor]:
        """Run the plan.

        Args:
            frames: 1 to `rows`.
            inputs: in the network's order: a batch, or its frames one by one.
            dtype: of the outputs; None is the plan's own.

        Returns:
            the outputs' batches, in memory of their own.
        """
        with self._turns.taken():
            for memory, given in zip(self._inputs.values(), inputs, strict=True):
                if isinstance(given, Tensor):
                    memory[:frames].copy_(given)
                else:
                    torch.stack(tuple(given), out=memory[:frames])
            with self._beside_default_stream() as stream:
                if frames == self._rows or self._whole:
                    self._run_full(stream)
                else:
                    self._run_ragged(frames, stream)
            return [memory[:frames].to(dtype or memory.dtype, copy=True) for memory in self._outputs.values()]

    @contextmanager
    def _beside_default_stream(self) -> Iterator[int]:
        """The stream to run on: the current one, or, in place of the default one, where TensorRT would wait for the
        whole GPU and nothing can be captured, one of our own that waits for it and that it waits for."""
        if self._stream is None:
            yield 0
            return
        current = torch.cuda.current_stream(self._device)
        if current != torch.cuda.default_stream(self._device):
            yield current.cuda_stream
            return
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield self._stream.cuda_stream
        current.wait_stream(self._stream)

    def _run_full(self, stream: int) -> None:
        if self._ran and self._graphs and self._replay is None:
            self._replay = self._capture(stream)
        if self._replay is not None:
            self._replay()
            return
        self._launch(self._full, stream)
        if not self._ran:  # a graph must not hold what a plan does at its first run alone
            self._ran = True
            self._plan.warmed()

    def _capture(self, stream: int) -> Callable[[], None] | None:
        self._graphs = False  # there is one attempt
        if not getattr(self._full, "is_stream_capturable", lambda stream: True)(stream):
            self._notes.append(
                "TensorRT's launches cannot be captured in a CUDA graph here: each batch is launched anew"
            )
            return None
        try:
            return captured(lambda handle: self._launch(self._full, handle), self._device)
        except CaptureError:
            raise
        except (RuntimeError, PlanError) as error:
            reason = first_line(error)
            self._notes.append(f"TensorRT's launches could not be captured in a CUDA graph ({reason})")
            return None

    def _run_ragged(self, frames: int, stream: int) -> None:
        if self._ragged is None:
            self._ragged = self._context(often=False)
        if self._ragged is None:  # no memory for a second context: the first one does, with rows that nobody reads
            self._whole = True
            self._run_full(stream)
            return
        if frames != self._ragged_rows:
            self._shape(self._ragged, frames)
            self._ragged_rows = frames
        self._launch(self._ragged, stream)

    def _context(self, often: bool) -> Context | None:
        context = self._plan.context(often)
        if context is not None:
            for name, memory in (self._inputs | self._outputs).items():
                context.set_tensor_address(name, memory.data_ptr())
        return context

    def _shape(self, context: Context, frames: int) -> None:
        for name, memory in self._inputs.items():
            if not context.set_input_shape(name, (frames, *memory.shape[1:])):
                raise self._plan.error()

    def _launch(self, context: Context, stream: int) -> None:
        if not context.execute_async_v3(stream):
            raise self._plan.error()


def buffer(value: Any, rows: int, device: torch.device) -> Tensor:
    tensor = value.type.tensor_type
    shape = [dim.dim_value for dim in tensor.shape.dim][1:]
    return torch.zeros(rows, *shape, dtype=TYPES[tensor.elem_type], device=device)
