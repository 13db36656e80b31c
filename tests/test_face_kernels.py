"""The kernels that crop and paste a face on a processor, against float64 and the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gpurender import crop_faces, paste_faces
from gpurender.cubic import resize_cubic
from gpurender.face_kernels import kernel_for
from gpurender.jit import Processor, this_processor
from gpurender.ops import Impl

Box = tuple[int, int, int, int]


def check(width: int, height: int, box: Box, keep: bool, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    frame = torch.randint(0, 256, (3, height, width), generator=random, dtype=torch.uint8)
    crop = torch.randint(0, 256, (3, 328, 328), generator=random, dtype=torch.uint8)
    prediction = torch.rand(3, 320, 320, generator=random) * 1.2 - 0.1  # beyond 0..1, too
    mask = torch.rand(height, width, generator=random) < 0.5 if keep else None
    pasted = paste(frame, crop, prediction, box, mask)
    check_crop(frame, box)

    face = crop.double()
    face[:, 4:-4, 4:-4] = (prediction * 255).clamp(0, 255).floor().flip(0)
    x0, y0, x1, y1 = box
    for kind, most in ((torch.float32, 0.501), (torch.float64, 0.52)):  # whose places are exact to 3e-5 of a pixel
        resized = resize_cubic(face.to(kind)[None], (y1 - y0, x1 - x0))[0].clamp(0, 255)
        exact = frame.to(kind)
        exact[:, y0:y1, x0:x1] = resized
        if mask is not None:
            exact = torch.where(mask, frame.to(kind), exact)
        assert (pasted - exact).abs().max() <= most
    outside = torch.ones(height, width, dtype=torch.bool)
    outside[y0:y1, x0:x1] = False
    outside |= mask if mask is not None else False
    assert torch.equal(pasted[:, outside], frame[:, outside])
    assert differing(pasted, paste(frame, crop, prediction, box, mask, impl="reference")) <= 1


def check_crop(frame: Tensor, box: Box) -> None:
    x0, y0, x1, y1 = box
    cropped = crop_faces(frame[None], torch.tensor([box]))[0]
    for kind, most in ((torch.float32, 0.501), (torch.float64, 0.52)):
        exact = resize_cubic(frame[None, :, y0:y1, x0:x1].to(kind), (328, 328))[0].clamp(0, 255)
        assert (cropped - exact).abs().max() <= most
    interleaved = frame[None].contiguous(memory_format=torch.channels_last)
    assert torch.equal(crop_faces(interleaved, torch.tensor([box]))[0], cropped)


def paste(
    frame: Tensor, crop: Tensor, prediction: Tensor, box: Box, mask: Tensor | None, impl: Impl | None = None
) -> Tensor:
    keep = mask[None] if mask is not None else None
    return paste_faces(frame[None], crop[None], prediction[None], torch.tensor([box]), keep, impl=impl)[0]


def cropped(
    frame: Tensor, crop: Tensor, prediction: Tensor, box: Box, mask: Tensor | None, impl: Impl | None
) -> Tensor:
    return crop_faces(frame[None], torch.tensor([box]), impl=impl)[0]


def differing(a: Tensor, b: Tensor) -> int:
    return int((a.int() - b.int()).abs().max())


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((300, 300), (1, 0, 299, 298)),
        ((640, 480), (100, 50, 428, 378)),  # 328×328: nothing is resized
        ((700, 700), (0, 0, 700, 700)),
        ((64, 40), (17, 3, 33, 4)),  # one row of one vector
        ((50, 40), (20, 9, 49, 38)),
        ((50, 40), (20, 9, 25, 14)),  # narrower than a vector: the reference
    ],
)
def test_a_face_is_pasted(processor: Processor, size: tuple[int, int], box: Box, keep: bool) -> None:
    assert kernel_for(328)
    check(*size, box, keep, seed=1)


@settings(max_examples=40)
@given(data=st.data())
def test_rectangles_of_any_size(data: st.DataObject) -> None:
    if not this_processor().lanes:
        pytest.skip("this processor has neither AVX2 nor AVX-512: NO KERNEL RUNS HERE")
    width, height = data.draw(st.tuples(st.integers(1, 400), st.integers(1, 400)), "size")
    x0, y0 = data.draw(st.integers(0, width - 1), "x0"), data.draw(st.integers(0, height - 1), "y0")
    x1, y1 = data.draw(st.integers(x0 + 1, width), "x1"), data.draw(st.integers(y0 + 1, height), "y1")
    check(width, height, (x0, y0, x1, y1), data.draw(st.booleans(), "keep"), data.draw(st.integers(0, 99), "seed"))


def test_how_many_bytes_differ_from_the_reference(processor: Processor) -> None:
    random = torch.Generator().manual_seed(2)
    count = total = 0
    for size in (281, 300, 407, 512):
        frame = torch.randint(0, 256, (3, size, size), generator=random, dtype=torch.uint8)
        crop = torch.randint(0, 256, (3, 328, 328), generator=random, dtype=torch.uint8)
        prediction = torch.rand(3, 320, 320, generator=random)
        box = (0, 0, size, size)
        for function in (paste, cropped):
            found, expected = (function(frame, crop, prediction, box, None, impl) for impl in (None, "reference"))
            count += int((found != expected).sum())
            total += expected.numel()
    assert count <= 1e-4 * total


def test_faces_that_are_too_narrow_for_kernels_in_a_batch_with_others() -> None:
    """All of the batch are the reference's then: a kernel would write beyond a row of twelve pixels."""
    frames = torch.randint(0, 256, (2, 3, 320, 330), dtype=torch.uint8)
    crops = torch.randint(0, 256, (2, 3, 328, 328), dtype=torch.uint8)
    predictions = torch.rand(2, 3, 320, 320)
    for wide, narrow in ((0, 1), (1, 0)):
        rects = torch.zeros(2, 4, dtype=torch.int64)
        rects[wide], rects[narrow] = torch.tensor([5, 3, 300, 298]), torch.tensor([7, 9, 9, 11])
        assert not kernel_for(2)
        for ours, theirs in zip(
            (crop_faces(frames, rects), paste_faces(frames, crops, predictions, rects)),
            (
                crop_faces(frames, rects, impl="reference"),
                paste_faces(frames, crops, predictions, rects, impl="reference"),
            ),
            strict=True,
        ):
            assert torch.equal(ours, theirs)
