"""The ranges of what a network's convolutions multiply, measured on a few frames, and 8-bit integers by them."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import openvino
import openvino.opset13 as opset
from torch import Tensor

from .errors import InputError

CONVOLUTIONS = ("Convolution", "GroupConvolution")
MARGIN = 1.1  # for frames that go beyond; measured: 1 and 1.2 are worse in the worst of 300

Ranges = dict[str, tuple[float, float]]
"""The least and the largest number that an operation gave, by the operation's name."""


def measured_ranges(decoder: openvino.Model, items: Iterable[Sequence[Tensor]]) -> Ranges:
    """Of all that convolutions of the decoder multiply, in float32, and a tenth more.

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
    lows = [opset.reduce_min(values[name], axes_of(values[name])) for name in signed]
    highs = [opset.reduce_max(value, axes_of(value)) for value in values.values()]
    model = openvino.Model([*lows, *highs], measured.get_parameters())  # pyright: ignore  # its annotations contradict each other
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = []
    for item in items:
        extremes = compiled([tensor[None].float().numpy() for tensor in item])
        found.append([float(extremes[i].item()) for i in range(len(compiled.outputs))])
    if not np.isfinite(found).all():
        raise InputError("the network gives numbers that are not finite: its weights may be damaged.")
    least = dict(zip(signed, MARGIN * np.min(found, 0), strict=False))
    most = dict(zip(values, MARGIN * np.max(found, 0)[len(signed) :], strict=True))
    return {name: (float(least.get(name, 0)), float(high)) for name, high in most.items()}


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


def axes_of(value: openvino.Output) -> np.ndarray:
    return np.arange(len(value.get_shape()))


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
