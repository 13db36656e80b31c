"""Pixels stay on the device: the render's loop copies none of them to the host or back, and never waits for the GPU."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from conftest import TINY, MakeTemplate
from residency import Seen, copied, fake, watched
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from gpurender import Features, Template, UNet, load_engine, load_features, open_template, render
from gpurender.host_frames import as_nv12
from gpurender.render import Pixels
from gpurender.torch_engine import PlainUNet, TorchEngine

FRAMES, HEIGHT, WIDTH = 6, 120, 160


class FakeTemplate:
    """A template whose frames are fake tensors on a GPU; rectangles are on the host, as a real one's."""

    def __init__(self, mode: FakeTensorMode, parsing: bool) -> None:
        self._mode = mode
        self._parsing = parsing
        self.device = torch.device("cuda")
        self.memory_left = 10**12
        self.rects = torch.tensor([[20 + i, 10, 100 + i, 90 + i // 3] for i in range(FRAMES)])

    def __len__(self) -> int:
        return FRAMES

    def frames(self, indices: list[int]) -> tuple[Tensor, Tensor | None]:
        frames = fake((len(indices), 3, HEIGHT, WIDTH), torch.uint8, self._mode)
        keep = fake((len(indices), HEIGHT, WIDTH), torch.bool, self._mode) if self._parsing else None
        return frames, keep


class FakeFeatures:
    mode = "ave"

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode

    def __len__(self) -> int:
        return 3 * FRAMES + 1  # the last batch is ragged

    def windows(self, start: int, stop: int) -> Tensor:
        return fake((stop - start, 32, 16, 16), torch.float32, self._mode)


def in_this_thread(name: str, work: Callable, items: Iterable, device: torch.device, timings: object) -> Iterator:
    return (work(item) for item in items)


@pytest.mark.parametrize("parsing", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("pixels", ["rgb", "nv12"])
def test_the_loop_neither_copies_nor_waits(
    monkeypatch: pytest.MonkeyPatch, parsing: bool, precision: str, pixels: Pixels
) -> None:
    monkeypatch.setattr(sys.modules["gpurender.render"], "stage", in_this_thread)
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # rectangles are real, on the host
    engine = TorchEngine(UNet(**TINY).eval(), torch.device("cpu"), precision)
    engine.device = torch.device("cuda")
    network = cast(PlainUNet, engine._network)
    inside: list[Seen] = []

    def faked(work: Callable) -> Callable:
        """What layers make from nothing is to be fake, too."""

        def run(*given: object) -> object:
            with mode, watched() as seen:
                inside.append(seen)
                return work(*given)

        return run

    for half in ("encode", "decode"):
        monkeypatch.setattr(network, half, faked(getattr(network, half)))
    for module in network._network.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = fake(tuple(tensor.shape), tensor.dtype, mode)  # pyright: ignore[reportArgumentType]
    template, features = cast(Template, FakeTemplate(mode, parsing)), cast(Features, FakeFeatures(mode))
    frames = 0
    with watched() as seen:
        for batch in render(template, features, engine, batch=4, pixels=pixels):
            surfaces = as_nv12(batch)
            assert (batch.device.type, surfaces.device.type) == ("cuda", "cuda")
            assert surfaces.shape[1:] == (HEIGHT * 3 // 2, WIDTH)
            frames += len(batch)
    assert frames == len(features)
    assert len(inside) > len(features) // 4
    for part in (seen, *inside):
        assert part.copies == []
        assert part.waits == []


@pytest.mark.parametrize(
    "careless",
    [
        lambda pixels: pixels.cpu(),
        lambda pixels: pixels.to("cpu", torch.float32),
        lambda pixels: pixels.new_empty(pixels.shape, device="cpu").copy_(pixels),
    ],
)
def test_copies_are_seen(careless: Callable[[Tensor], object]) -> None:
    pixels = fake((1, 3, HEIGHT, WIDTH), torch.uint8, FakeTensorMode())
    with watched() as seen:
        careless(pixels)
    assert [size >= 3 * HEIGHT * WIDTH for _, size in seen.copies] == [True]


@pytest.mark.parametrize(
    "careless",
    [
        lambda pixels: pixels.sum().item(),
        lambda pixels: pixels.max().tolist(),
        lambda pixels: bool((pixels > 3).any()),
        lambda pixels: pixels[pixels > 3],
        lambda pixels: (pixels > 3).nonzero(),
    ],
)
def test_waits_are_seen(careless: Callable[[Tensor], object]) -> None:
    pixels = fake((1, 3, HEIGHT, WIDTH), torch.uint8, FakeTensorMode())
    no_values = suppress(DataDependentOutputException, DynamicOutputShapeException)  # a fake tensor's errors
    with watched() as seen, no_values:
        careless(pixels)
    assert len(seen.waits) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("pixels", ["rgb", "nv12"])
def test_no_pixels_cross_on_the_gpu(
    make_template: MakeTemplate, tiny_unet: Path, tmp_path: Path, pixels: Pixels
) -> None:
    np.save(tmp_path / "features.npy", np.random.RandomState(3).uniform(0, 2, (200, 512)).astype(np.float32))
    device = torch.device("cuda")
    template = open_template(make_template(), device=device)
    features = load_features(tmp_path / "features.npy", device=device)
    engine = load_engine(tiny_unet, device=device, engine="torch", precision="fp16")
    batches = render(template, features, engine, batch=8, pixels=pixels)
    for _ in range(5):  # the template's frames are decoded and kept by now
        as_nv12(next(batches))

    def steady_state() -> None:
        for _ in range(10):
            as_nv12(next(batches))

    copies = copied(steady_state, tmp_path / "trace.json")
    batches.close()
    one_frame = template.width * template.height
    assert all(size < one_frame for sizes in copies.values() for size in sizes), copies
