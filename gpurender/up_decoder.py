"""The network's second half on a processor: OpenVINO up to the large `up` blocks, then kernels of our own."""

import ctypes
import queue
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import openvino
import torch
from torch import Tensor

from .jit import compiled, this_processor
from .kernels.up import scratch_places, write_up
from .kernels.up_weights import UpShape, packed
from .kernels.vectors import rounded_up
from .network import FACE_SHAPE
from .openvino_graph import channels_last, in_bfloat16
from .openvino_requests import compiled_model, shared
from .up_blocks import UpBlock, find_up_blocks


def up_decoder(decoder: openvino.Model, precision: str, kept: torch.dtype) -> "UpDecoder | None":
    """The decoder as `UpDecoder`, if its last blocks are such as the kernels compute, and that pays here.

    It does not pay in bfloat16 on processors that multiply matrices of it (AMX), as OpenVINO makes use of.

    Args:
        precision: see `compiled_model`.
        kept: the type in which the inputs come, but for the audio.
    """
    processor = this_processor()
    if not processor.lanes or (precision != "fp32" and (processor.tiles or not processor.half)):
        return None
    decoder = decoder.clone()
    blocks = find_up_blocks(decoder)
    halves = [precision == "bf16" or (precision == "mixed" and block.height >= FACE_SHAPE[1]) for block in blocks]
    odd = [half and any(n % 2 for n in channels_of(block)) for block, half in zip(blocks, halves, strict=True)]
    return UpDecoder(decoder, blocks, halves, precision, kept) if blocks and not any(odd) else None


def channels_of(block: UpBlock) -> tuple[int, int, int]:
    """Of y, the skip and x."""
    return block.below, block.weights.expand.shape[1] - block.below, len(block.weights.project)


class Worker(NamedTuple):
    """What one thread works with: a request of the head, what that and each block but the last gives, and scratch
    memory of each block."""

    head: openvino.InferRequest
    between: list[Tensor]
    scratch: list[Tensor]


class UpDecoder:
    """A decoder whose last blocks are kernels, as many frames at once as there are cores.

    Attributes:
        output_shapes: without the batch axis.
        at_once: how many frames keep the cores busy.
    """

    def __init__(
        self,
        decoder: openvino.Model,
        blocks: Sequence[UpBlock],
        halves: Sequence[bool],
        precision: str,
        kept: torch.dtype,
    ) -> None:
        """
        Args:
            decoder: with float32 inputs.
            blocks: `find_up_blocks` of it.
            halves: which blocks are computed in bfloat16.
            precision, kept: see `up_decoder`.
        """
        self.output_shapes = [tuple(decoder.output(0).shape)[1:]]
        given = [parameter.get_friendly_name() for parameter in decoder.get_parameters()]
        head = channels_last(head_of(decoder, blocks[0].y), [], [0])
        self._of_head = [given.index(parameter.get_friendly_name()) for parameter in head.get_parameters()]
        if kept == torch.bfloat16:
            levels = [i for i, n in enumerate(self._of_head) if n < len(given) - 1]
            head = in_bfloat16(head, levels, [])
        if halves[0]:
            head = in_bfloat16(head, [], [0])
        compiled_head = compiled_model(head, precision)
        self.at_once: int = compiled_head.get_property("INFERENCE_NUM_THREADS")  # a kernel is one thread

        self._skips = [block.skip for block in blocks]
        self._kernels: list[UpKernel] = []
        for block, half, half_out in zip(blocks, halves, [*halves[1:], False], strict=True):
            stride = self._kernels[-1].stride if self._kernels else block.below
            self._kernels.append(UpKernel(block, stride, half, half_out, kept))
        *height_and_width, channels = list(compiled_head.outputs[0].shape)[1:]
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for _ in range(self.at_once):
            first = torch.empty(*height_and_width, channels, dtype=torch.bfloat16 if halves[0] else torch.float32)
            between = [first, *(kernel.room() for kernel in self._kernels[:-1])]
            scratch = [kernel.scratch() for kernel in self._kernels]
            self._idle.put(Worker(compiled_head.create_infer_request(), between, scratch))
        self._pool = ThreadPoolExecutor(self.at_once, "network")

    def start(self, items: Sequence[tuple[Tensor, ...]], outputs: Sequence[tuple[Tensor, ...]]) -> "Started":
        """Each item's inputs to its outputs, without the batch axis. Contiguous inputs are not copied; outputs are
        contiguous, on multiples of 64 bytes."""
        frames = zip(items, outputs, strict=True)
        return Started([self._pool.submit(self._decode, item, picture) for item, (picture,) in frames])

    def _decode(self, item: tuple[Tensor, ...], picture: Tensor) -> None:
        item = tuple(tensor.contiguous() for tensor in item)
        worker = self._idle.get()
        try:
            for i, n in enumerate(self._of_head):
                worker.head.set_input_tensor(i, shared(item[n]))
            worker.head.set_output_tensor(0, shared(worker.between[0]))
            worker.head.infer()
            steps = zip(self._kernels, worker.between, self._skips, worker.scratch, strict=True)
            for (kernel, y, n, scratch), out in zip(steps, [*worker.between[1:], picture], strict=True):
                kernel(y, item[n], scratch, out)
        finally:
            self._idle.put(worker)


class Started:
    """Frames that are being decoded."""

    def __init__(self, frames: Sequence[Future[None]]) -> None:
        self._frames = frames

    def wait(self) -> None:
        for frame in self._frames:
            frame.result()


def head_of(decoder: openvino.Model, y: openvino.Output) -> openvino.Model:
    """What computes y, with those of the inputs that it needs, in their order."""
    needed, ahead = set(), [y.get_node()]
    while ahead:
        node = ahead.pop()
        if node.get_friendly_name() not in needed:
            needed.add(node.get_friendly_name())
            ahead += [value.get_node() for value in node.input_values()]
    inputs = [parameter for parameter in decoder.get_parameters() if parameter.get_friendly_name() in needed]
    head = openvino.Model([y], inputs)  # pyright: ignore  # its own annotations contradict each other
    return head.clone()  # in which y has no other consumers


class UpKernel:
    """A block's kernel and its weights.

    Attributes:
        stride: channels from one pixel of its output to the next.
    """

    def __init__(self, block: UpBlock, below_stride: int, half: bool, half_out: bool, kept: torch.dtype) -> None:
        """
        Args:
            below_stride: channels from one pixel of y to the next.
            half, half_out: see `UpShape`.
            kept: the type of the face or skip that it will get.
        """
        weights = block.weights
        self._shape = shape = UpShape(
            height=block.height,
            width=block.width,
            below=block.below,
            below_stride=below_stride // (2 if half else 1),
            face=block.face,
            skip=weights.expand.shape[1] - block.below,
            inner=len(weights.expand),
            out=len(weights.project),
            inner2=len(weights.expand2),
            picture=weights.last is not None,
            half=half,
            face_half=kept == torch.bfloat16,
            half_out=half_out,
            lanes=this_processor().lanes,
        )
        self.stride = rounded_up(shape.out, shape.lanes)
        name = "up_" + "_".join(str(int(value)) for value in shape)
        address = compiled(name, lambda module: write_up(module, name, shape))
        self._function = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 5)(address)  # which lets other threads work
        self._weights = torch.from_numpy(packed(weights, shape)).clone()  # where torch aligns it

    def room(self) -> Tensor:
        """For its output, (height,width,stride)."""
        shape = self._shape
        kind = torch.bfloat16 if shape.half_out else torch.float32
        return torch.empty(shape.height, shape.width, self.stride, dtype=kind)

    def scratch(self) -> Tensor:
        return torch.zeros(scratch_places(self._shape)[1])

    def __call__(self, y: Tensor, seen: Tensor, scratch: Tensor, out: Tensor) -> None:
        if self._shape.half and not self._shape.face:
            seen = seen.bfloat16()
        self._function(*(tensor.data_ptr() for tensor in (y, seen, self._weights, scratch, out)))
