"""What the machine could do at best, measured, and what each stage has to do at least, counted: a roofline.

S. Williams, A. Waterman, D. Patterson, "Roofline: an insightful visual performance model for multicore architectures",
Communications of the ACM 52 (2009).
"""

import time
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import torch
from onnx import ModelProto
from torch.utils.flop_counter import FlopCounterMode

from ..audio import ENCODE_CHUNK
from ..crop import CROP, INNER
from ..export import cached_onnx
from ..halves import cut, infer_shapes, read_network
from ..network import FACE_SHAPE, MEL_SHAPE, WINDOW_SHAPES, load_audio_encoder
from ..openvino_requests import compiled_model, has_bfloat16
from ..private_openvino import openvino, opset
from ..ranges import in_bytes
from ..torch_engine import TYPES
from .measured import Measured
from .subject import Loaded

COPIED_BYTES = 2**28
SQUARE = {"cpu": 1536, "cuda": 8192}  # rows of the matrices
CUBIC_FLOPS = 7  # of a value out of four: four products, three sums
COLOUR_FLOPS = 13  # a pixel: 5 for luma, and a quarter of a 2×2 block at 32 (9 means, 5 luma, 2 × 5, 8 to round)


class Count(NamedTuple):
    """What a stage cannot do without, a frame: bytes that it reads and writes once, and sums and products.

    Attributes:
        bytes: what goes in and out, and a batch's share of the weights; what lies between layers is not counted.
        flops: None where nobody counts them: a codec's work.
        precision: of the arithmetic.
    """

    bytes: float
    flops: float | None
    precision: str = "fp32"


def copy_bandwidth(device: torch.device, repeats: int) -> list[float]:
    """Bytes a second that a copy within the device's memory reads and writes, each counted."""
    source = torch.ones(COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    return [2 * COPIED_BYTES / seconds for seconds in clocked(lambda: target.copy_(source), device, repeats)]


def product_rate(device: torch.device, precision: str, repeats: int) -> list[float]:
    """FLOP a second of a large matrix product, sums and products each counted; float32 is exact, not TF32.

    torch multiplies; 8-bit integers OpenVINO, which is 1.6 times as fast (measured).
    """
    rows = SQUARE[device.type]
    if precision == "int8":
        request, given = byte_product(rows), np.random.default_rng(1).random((1, rows, rows, 1), np.float32)
        return [2 * rows**3 / seconds for seconds in clocked(lambda: request.infer([given]), device, repeats)]
    left, right = (torch.rand(rows, rows, device=device).to(TYPES[precision]) for _ in range(2))
    exact = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        return [2 * rows**3 / seconds for seconds in clocked(lambda: left @ right, device, repeats)]
    finally:
        torch.backends.cuda.matmul.allow_tf32 = exact


def byte_product(rows: int) -> openvino.InferRequest:
    """A product of two square matrices of bytes, and its largest number."""
    given = opset.parameter([1, rows, rows, 1], np.float32)
    weights = np.random.default_rng(2).standard_normal((rows, rows, 1, 1), np.float32)
    product = opset.convolution(given, weights, [1, 1], [0, 0], [0, 0], [1, 1])
    model = openvino.Model([opset.reduce_max(product, np.arange(4))], [given])  # pyright: ignore  # as in `ranges`
    return compiled_model(in_bytes(model, {given.get_friendly_name(): (0.0, 1.0)}), "int8").create_infer_request()


def clocked(work: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Seconds of the quickest of five calls, several times: a limit is what can be reached."""
    best = []
    for _ in range(repeats):
        seconds = []
        for _ in range(6):
            began = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - began)
        best.append(min(seconds[1:]))
    return best


def measured_limits(device: torch.device, precision: str, repeats: int) -> list[Measured]:
    where = {"device": str(device)}
    copied = {**where, "bytes": COPIED_BYTES}
    products = [
        Measured(
            f"matrix product {kind}",
            {**where, "rows": SQUARE[device.type], "precision": kind},
            "FLOP a second",
            product_rate(device, kind, repeats),
        )
        for kind in dict.fromkeys(("fp32", *types_of_halves(precision)))
    ]
    return [Measured("copy bandwidth", copied, "bytes a second", copy_bandwidth(device, repeats)), *products]


def types_of_halves(precision: str) -> tuple[str, str]:
    """What the network's halves compute in at best."""
    if precision == "mixed":
        return "fp32", "bf16"
    if precision == "int8":
        return "bf16" if has_bfloat16() else "fp32", "int8"
    return precision, precision


# --- what stages have to do ------------------------------------------------------------------------------------------


def counts(loaded: Loaded) -> dict[str, Count]:
    """What each stage has to do for a frame, of the template's mean face rectangle."""
    template, engine = loaded.template, loaded.engine
    sides = (template.rects[:, 2:] - template.rects[:, :2]).double()
    width, height = sides.mean(0).tolist()
    area = sides.prod(1).mean().item()
    pixels = template.width * template.height
    mask = template.parsing
    face_bytes = 4 * prod(FACE_SHAPE)
    picture_bytes = 4 * 3 * INNER**2
    first_half, second_half = types_of_halves(engine.precision)
    value = TYPES[first_half].itemsize  # of weights, and of what is between the halves
    heard_value = 1 if second_half == "int8" else value
    network = loaded.subject.model
    seen, heard = unet_work(network if network.suffix.lower() == ".onnx" else cached_onnx(network, engine.mode))
    crop_flops = CUBIC_FLOPS * 3 * (CROP * height + CROP * CROP)
    paste_flops = CUBIC_FLOPS * 3 * (width * CROP + area)
    encoded_bytes = (3 if loaded.pixels == "rgb" else 1.5) * pixels
    # What is pasted is made NV12 with it, or pasted on a copy of an NV12 frame, or stays RGB.
    coloured, around = {"nv12": (pixels, 4.5 * pixels), "rgb": (0.0, 0.0)}[loaded.pixels]
    others = {"template again": Count(2 * pixels * (3 + mask), None)}
    if loaded.on_backdrops:
        coloured, around = area, 1.5 * area + 2 * encoded_bytes
        others = {"colour": Count(4.5 * pixels, COLOUR_FLOPS * pixels)}
    audio, window = audio_work(loaded.subject.audio_encoder), 4 * prod(WINDOW_SHAPES[engine.mode])
    return {
        "template decode": Count(pixels * (3 + mask), None),
        **others,
        "audio": Count(
            4 * (audio.inputs + audio.outputs + audio.weights / ENCODE_CHUNK[loaded.device.type]) + 2 * window,
            audio.flops,
        ),
        "crop": Count(3 * area + 3 * CROP**2 + face_bytes, crop_flops + 3 * INNER**2),
        "network encode": Count(
            face_bytes + value * seen.outputs + value * seen.weights / loaded.batch, seen.flops, first_half
        ),
        "network decode": Count(
            value * heard.inputs + picture_bytes + heard_value * heard.weights / loaded.batch,
            heard.flops,
            second_half,
        ),
        "paste": Count(
            3 * CROP**2 + picture_bytes + (3 + mask) * area + around,
            paste_flops + COLOUR_FLOPS * coloured,
        ),
        "encode": Count(encoded_bytes, None),
    }


class Work(NamedTuple):
    """Of one half of a network and one frame; the last three are numbers of values."""

    flops: float
    weights: int
    inputs: int
    outputs: int


def unet_work(path: Path) -> tuple[Work, Work]:
    """The two halves of a U-Net in ONNX, after `ease`: what is done once a template frame, and what an output frame
    costs. An engine that runs the file as it is does more."""
    from ..linear import ease  # its libraries take a while to load

    model, mode = read_network(path)
    halves = cut(ease(model), mode)
    seen = onnx_work(halves.encoder) if halves.encoder else Work(0.0, 0, 0, 0)
    return seen, onnx_work(halves.decoder)


def onnx_work(model: ModelProto) -> Work:
    """The convolutions and matrix products of an ONNX graph, for one frame of its batch."""
    shapes = {v.name: shape_of(v) for v in (*infer_shapes(model), *model.graph.input, *model.graph.output)}
    weights = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    for node in model.graph.node:
        for value in node.attribute if node.op_type == "Constant" else ():
            weights[node.output[0]] = tuple(value.t.dims)
    flops = 0.0
    for node in model.graph.node:
        if node.op_type == "Conv" and node.input[1] in weights:
            flops += 2 * prod(shapes[node.output[0]]) * prod(weights[node.input[1]][1:])
        elif node.op_type in ("MatMul", "Gemm") and node.output[0] in shapes:
            inner = shapes.get(node.input[0]) or weights[node.input[0]]
            flops += 2 * prod(shapes[node.output[0]]) * inner[-1]
    given = [value for value in model.graph.input if value.name not in weights]
    batch = shape_of(given[0])[0]
    return Work(
        flops / batch,
        sum(prod(shape) for shape in weights.values()),
        sum(prod(shape_of(value)[1:]) for value in given),
        sum(prod(shape_of(value)[1:]) for value in model.graph.output),
    )


def shape_of(value: onnx.ValueInfoProto) -> tuple[int, ...]:
    """Of a tensor; a batch that may be anything is taken to be 1."""
    return tuple(dim.dim_value or 1 for dim in value.type.tensor_type.shape.dim)


def audio_work(path: Path) -> Work:
    """Of the audio encoder, for one feature; what comes before it is small."""
    if path.suffix.lower() == ".onnx":
        return onnx_work(onnx.load(path))
    network = load_audio_encoder(path).to("meta")
    mel = torch.empty(1, *MEL_SHAPE, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        feature = network(mel)
    weights = sum(parameter.numel() for parameter in network.parameters())
    return Work(counter.get_total_flops(), weights, mel.numel(), feature.numel())


# --- how near a stage comes ------------------------------------------------------------------------------------------


def least_ms(count: Count, bandwidth: float, rates: dict[str, float]) -> float:
    """The milliseconds below which a stage cannot be: its bytes at the copy's rate or its arithmetic at the matrix
    product's, whichever takes longer."""
    arithmetic = count.flops / rates[count.precision] if count.flops else 0.0
    return 1000 * max(count.bytes / bandwidth, arithmetic)
