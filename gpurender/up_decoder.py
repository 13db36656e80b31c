"""The network's second half on a processor: OpenVINO up to the large `up` blocks, then kernels of our own."""

import queue
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from .jit import Processor, compiled, this_processor
from .kernels.up import scratch_places, skip_scratch_places, write_skip, write_up
from .kernels.up_weights import Levels, UpLevels, UpShape, fits, fits_tiles, packed, skip_stride, window_bytes
from .kernels.vectors import rounded_up
from .network import FACE_SHAPE, Encoded
from .openvino_graph import channels_last, in_bfloat16
from .openvino_requests import compiled_model, shared
from .private_openvino import openvino
from .ranges import Ranges, in_bytes
from .up_blocks import UpBlock, find_up_blocks


def up_decoder(decoder: openvino.Model, precision: str, kept: torch.dtype, ranges: Ranges | None) -> "UpDecoder | None":
    """The decoder as `UpDecoder`, if its last blocks are such as the kernels compute, and that pays here.

    Args:
        precision: see `load_engine`.
        kept: the type in which the inputs come, but for the audio.
        ranges: `measured_ranges` of the decoder, for `int8`.
    """
    processor = this_processor()
    if not processor.lanes or (precision != "fp32" and not can_multiply(processor, precision)):
        return None
    decoder = decoder.clone()
    blocks = find_up_blocks(decoder)
    shapes = shapes_of(blocks, precision, kept)
    if not blocks or not all(map(fits, shapes)):
        return None
    readers = [*inputs_of(decoder, blocks[0].y), *(block.skip for block in blocks)]
    if len(set(readers)) < len(readers):  # what is kept as one block takes it would be another's, or the head's, too
        return None
    return UpDecoder(decoder, blocks, shapes, precision, kept, ranges)


def bytes_pay(decoder: openvino.Model) -> bool:
    """Whether the kernels compute the decoder's last blocks in bytes, depthwise convolutions included."""
    shapes = shapes_of(find_up_blocks(decoder.clone()), "int8", torch.float32)
    return bool(shapes) and all(fits(shape) and window_bytes(shape, shape.inner) == 1 for shape in shapes)


def can_multiply(processor: Processor, precision: str) -> bool:
    return processor.bytes if precision == "int8" else processor.bfloat16


def shapes_of(blocks: Sequence[UpBlock], precision: str, kept: torch.dtype) -> list[UpShape]:
    """What the kernels are compiled for, one after another."""
    per_word = {"fp32": 1, "mixed": 1, "bf16": 2, "int8": 4}[precision]
    words = [2 if precision == "mixed" and block.height >= FACE_SHAPE[1] else per_word for block in blocks]
    processor = this_processor()
    lanes = processor.lanes
    shapes: list[UpShape] = []
    for block, per_word, next_one in zip(blocks, words, [*words, 1][1:], strict=True):
        stride = rounded_up(shapes[-1].out, lanes) if shapes else block.below  # in channels
        weights = block.weights
        shape = UpShape(
            height=block.height,
            width=block.width,
            below=block.below,
            below_stride=stride // (2 if per_word == 2 else 1),
            face=block.face,
            skip=weights.expand.shape[1] - block.below,
            inner=len(weights.expand),
            out=len(weights.project),
            inner2=len(weights.expand2),
            picture=weights.last is not None,
            per_word=per_word,
            seen_bfloat16=kept == torch.bfloat16 or (per_word == 2 and not block.face),
            out_bfloat16=next_one == 2,
            lanes=lanes,
            tiles=False,
        )
        shapes.append(shape._replace(tiles=processor.tiles and fits_tiles(shape)))
    return shapes


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
        shapes: Sequence[UpShape],
        precision: str,
        kept: torch.dtype,
        ranges: Ranges | None,
    ) -> None:
        """
        Args:
            decoder: with float32 inputs.
            blocks: `find_up_blocks` of it.
            shapes: `shapes_of` them.
            precision, kept, ranges: see `up_decoder`.
        """
        self.output_shapes = [tuple(decoder.output(0).shape)[1:]]
        self._of_head = inputs_of(decoder, blocks[0].y)
        head = head_of(decoder, blocks[0].y)
        if ranges is not None:
            head = in_bytes(head, ranges)
        head = channels_last(head, [], [0])
        if kept == torch.bfloat16:
            levels = [i for i, n in enumerate(self._of_head) if n < len(decoder.inputs) - 1]
            head = in_bfloat16(head, levels, [])
        if shapes[0].per_word == 2:
            head = in_bfloat16(head, [], [0])
        compiled_head = compiled_model(head, precision)
        self.at_once: int = compiled_head.get_property("INFERENCE_NUM_THREADS")  # a kernel is one thread

        self._skips = [block.skip for block in blocks]
        self._kernels = [UpKernel(block, shape, ranges) for block, shape in zip(blocks, shapes, strict=True)]
        *height_and_width, channels = list(compiled_head.outputs[0].shape)[1:]
        kind = torch.bfloat16 if shapes[0].per_word == 2 else torch.float32
        workers = self.at_once + 1  # while one waits for Python's lock; measured: 4 % more frames
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for _ in range(workers):
            first = torch.empty(*height_and_width, channels, dtype=kind, device="cpu")
            between = [first, *(kernel.room() for kernel in self._kernels[:-1])]
            scratch = [kernel.scratch() for kernel in self._kernels]
            self._idle.put(Worker(compiled_head.create_infer_request(), between, scratch))
        self._pool = ThreadPoolExecutor(workers, "network")
        self._keepers = ThreadPoolExecutor(self.at_once, "keep")  # frames that are drawn need not be waited for

    def start(self, items: Sequence[tuple[Tensor, ...]], outputs: Sequence[tuple[Tensor, ...]]) -> "Started":
        """Each item's inputs, which are `kept` but for the audio, to its outputs, without the batch axis. Contiguous
        inputs are not copied; outputs are contiguous, on multiples of 64 bytes."""
        frames = zip(items, outputs, strict=True)
        return Started([self._pool.submit(self._decode, item, picture) for item, (picture,) in frames])

    def kept(self, encodings: Sequence[Encoded]) -> list[Encoded]:
        """What the encoder gave for some faces, as `start` takes it: in `int8`, skips are bytes."""
        return list(self._keepers.map(self._keep, encodings))

    def _keep(self, encoding: Encoded) -> Encoded:
        kept = list(encoding)
        for kernel, n in zip(self._kernels, self._skips, strict=True):
            kept[n] = kernel.kept(kept[n])
        return tuple(kept)

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
    """What computes y, with those of the inputs that it needs."""
    parameters = decoder.get_parameters()
    head = openvino.Model([y], [parameters[i] for i in inputs_of(decoder, y)])  # pyright: ignore  # its own annotations contradict each other
    return head.clone()  # in which y has no other consumers


def inputs_of(decoder: openvino.Model, y: openvino.Output) -> list[int]:
    """Which of the decoder's inputs y needs."""
    needed, ahead = set(), [y.get_node()]
    while ahead:
        node = ahead.pop()
        if node.get_friendly_name() not in needed:
            needed.add(node.get_friendly_name())
            ahead += [value.get_node() for value in node.input_values()]
    return [i for i, parameter in enumerate(decoder.get_parameters()) if parameter.get_friendly_name() in needed]


class UpKernel:
    """A block's kernel and its weights."""

    def __init__(self, block: UpBlock, shape: UpShape, ranges: Ranges | None) -> None:
        self._shape = shape
        self._function = up_function(shape)
        self._skip_function = skip_function(shape) if shape.per_word == 4 else None
        levels = UpLevels(*(Levels.between(*ranges[name]) for name in block.multiplied)) if ranges else None
        self._weights = torch.from_numpy(packed(block.weights, shape, levels)).clone()  # where torch aligns it
        seen_type = torch.bfloat16 if shape.seen_bfloat16 else torch.float32
        self._seen_type = torch.uint8 if self._skip_function else seen_type
        channels = skip_stride(shape) if self._skip_function else shape.face or shape.skip
        self._seen_size = shape.height * shape.width * channels

    def room(self) -> Tensor:
        """For its output, (height,width,channels)."""
        shape = self._shape
        kind = torch.bfloat16 if shape.out_bfloat16 else torch.float32
        return torch.empty(shape.height, shape.width, rounded_up(shape.out, shape.lanes), dtype=kind, device="cpu")

    def scratch(self) -> Tensor:
        return torch.zeros(scratch_places(self._shape)[1], dtype=torch.float32, device="cpu")

    def kept(self, seen: Tensor) -> Tensor:
        """The skip, or the face, as the kernel takes it."""
        if self._shape.seen_bfloat16:
            seen = seen.bfloat16()
        seen = seen.contiguous()
        if self._skip_function is None:
            return seen
        shape = self._shape
        scratch = torch.zeros(skip_scratch_places(shape)[1], dtype=torch.float32, device="cpu")
        skip = torch.empty(shape.height, shape.width, skip_stride(shape), dtype=torch.uint8, device="cpu")
        self._skip_function(*(tensor.data_ptr() for tensor in (seen, self._weights, scratch, skip)))
        return skip

    def __call__(self, y: Tensor, seen: Tensor, scratch: Tensor, out: Tensor) -> None:
        if (seen.dtype, seen.numel()) != (self._seen_type, self._seen_size):  # the kernel sees its address alone
            raise ValueError("these encodings are another engine's, or of another precision")
        self._function(*(tensor.data_ptr() for tensor in (y, seen, self._weights, scratch, out)))


def up_function(shape: UpShape) -> Callable[..., None]:
    name = f"up_{written(shape)}"
    return compiled(name, lambda module: write_up(module, name, shape), pointers=5)


def skip_function(shape: UpShape) -> Callable[..., None]:
    name = f"skip_{written(shape)}"
    return compiled(name, lambda module: write_skip(module, name, shape), pointers=4)


def written(shape: UpShape) -> str:
    return "_".join(str(int(value)) for value in shape)
