"""The ranges of what a network's convolutions multiply, measured on a few frames, and 8-bit integers by them."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from .errors import InputError
from .openvino_requests import Requests, has_bfloat16
from .private_openvino import openvino, opset

CONVOLUTIONS = ("Convolution", "GroupConvolution")
MARGIN = 1.1  # for frames that go beyond; measured: 1 and 1.2 are worse in the worst of 300

Ranges = dict[str, tuple[float, float]]
"""The least and the largest number that an operation gave, by the operation's name."""


def measured_ranges(decoder: openvino.Model, items: Sequence[Sequence[Tensor]]) -> Ranges:
    """Of all that convolutions of the decoder multiply, and a tenth more. In bfloat16 where that is faster: what it
    rounds is little against the tenth (measured: int8 draws as well).

    Args:
        decoder: with a batch of one and float32 inputs.
        items: the inputs of each frame, without the batch axis.

    Raises:
        InputError: some of it is not finite.
    """
    measured = decoder.clone()
    values = {
        value.get_node().get_friendly_name(): value
        for convolution in convolutions(measured)
        for value in parts(convolution.input_value(0))
    }
    signed = [name for name, value in values.items() if value.get_node().get_type_name() != "Relu"]
    precision, kind = ("bf16", torch.bfloat16) if has_bfloat16() else ("fp32", torch.float32)

    def extreme(reduce: Callable[..., openvino.Node], value: openvino.Output) -> openvino.Node:
        if precision == "bf16":  # else OpenVINO would compute in float32 what is reduced
            value = opset.convert(value, "bf16").output(0)
        return opset.unsqueeze(reduce(value, np.arange(len(value.get_shape()))), [0, 1])

    lows = [extreme(opset.reduce_min, values[name]) for name in signed]
    highs = [extreme(opset.reduce_max, value) for value in values.values()]
    model = openvino.Model([opset.concat([*lows, *highs], 1)], measured.get_parameters())  # pyright: ignore  # its annotations contradict each other
    extremes = torch.empty(len(items), len(lows) + len(highs), dtype=kind, device="cpu")
    Requests(model, precision).start([tuple(item) for item in items], [(row,) for row in extremes]).wait()
    extremes = extremes.float()
    if not extremes.isfinite().all():
        raise InputError("the network gives numbers that are not finite: its weights may be damaged.")
    least = dict(zip(signed, (MARGIN * extremes.amin(0)).tolist(), strict=False))
    most = dict(zip(values, (MARGIN * extremes.amax(0))[len(signed) :].tolist(), strict=True))
    return {name: (least.get(name, 0.0), high) for name, high in most.items()}


def convolutions(model: openvino.Model) -> Iterator[openvino.Node]:
    return (node for node in model.get_ordered_ops() if node.get_type_name() in CONVOLUTIONS)


def parts(value: openvino.Output) -> Iterator[openvino.Output]:
    """What this value is put together of, or interpolated from: its range is theirs."""
    node = value.get_node()
    joins = {"Concat": node.get_input_size(), "Interpolate": 1}.get(node.get_type_name(), 0)
    if not joins:
        yield value
    for i in range(joins):
        yield from parts(node.input_value(i))


def in_bytes(model: openvino.Model, ranges: Ranges) -> openvino.Model:
    """A copy whose convolutions multiply 8-bit integers: of what goes in by its range, of weights for each channel."""
    lowered = model.clone()
    quantised: dict[str, openvino.Output] = {}
    for convolution in list(convolutions(lowered)):
        value, weights = (convolution.input_value(i) for i in range(2))
        name = value.get_node().get_friendly_name()
        if name not in quantised:
            lows, highs = zip(*(ranges[part.get_node().get_friendly_name()] for part in parts(value)), strict=True)
            ends = np.float32(min(*lows, 0.0)), np.float32(max(*highs, 0.0))
            quantised[name] = opset.fake_quantize(value, *ends, *ends, 256).output(0)
        numbers = np.array(weights.get_node().get_data(), np.float32)
        of_channel = tuple(range(2 if convolution.get_type_name() == "GroupConvolution" else 1, numbers.ndim))
        most = np.abs(numbers).max(of_channel, keepdims=True)
        most[most == 0] = 1
        whole = opset.fake_quantize(opset.constant(numbers), -most, most, -most, most, 255)
        convolution.input(0).replace_source_output(quantised[name])
        convolution.input(1).replace_source_output(whole.output(0))
    lowered.validate_nodes_and_infer_types()
    return lowered
