import cv2
import numpy as np
import pytest
import torch
from conftest import picture
from hypothesis import given, settings
from hypothesis import strategies as st

from gpurender import crop_faces, face_input


def as_tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image).permute(2, 0, 1).contiguous()


def opencv_crop(image: np.ndarray, rect: list[int]) -> np.ndarray:
    x0, y0, x1, y1 = rect
    return cv2.resize(image[y0:y1, x0:x1], (328, 328), interpolation=cv2.INTER_CUBIC)


@settings(max_examples=30)
@given(st.integers(1, 500), st.integers(1, 500), st.integers(0, 30), st.integers(0, 30), st.integers(0, 5))
def test_crops_are_opencvs_within_one_level(width: int, height: int, x: int, y: int, number: int) -> None:
    image = picture(540, 540, number)
    rect = [x, y, x + width, y + height]
    crop = crop_faces(as_tensor(image)[None], torch.tensor([rect]))[0].permute(1, 2, 0).numpy()
    difference = np.abs(crop.astype(int) - opencv_crop(image, rect))
    assert difference.max() <= 1
    # Rare: OpenCV computes in fixed point, which shows where a few pixels make many values that are nearly ties.
    assert (difference > 0).mean() < (0.005 if min(width, height) >= 16 else 0.1)


def test_sizes_may_differ_within_a_batch(device: torch.device) -> None:
    images = [picture(640, 480, i) for i in range(5)]
    rects = [[10, 20, 194, 204], [0, 0, 328, 328], [300, 100, 480, 280], [11, 21, 195, 205], [140, 0, 620, 480]]
    frames = torch.stack([as_tensor(image) for image in images]).to(device)
    crops = crop_faces(frames, torch.tensor(rects)).cpu()
    for image, rect, crop in zip(images, rects, crops, strict=True):
        alone = crop_faces(as_tensor(image)[None], torch.tensor([rect]))[0]
        assert (crop.int() - alone.int()).abs().max() <= (0 if device.type == "cpu" else 1)


def test_a_face_of_328_is_not_changed(device: torch.device) -> None:
    frames = torch.stack([as_tensor(picture(400, 400, 1))]).to(device)
    assert torch.equal(crop_faces(frames, torch.tensor([[40, 50, 368, 378]])), frames[:, :, 50:378, 40:368])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_memory_layout_does_not_matter(layout: torch.memory_format) -> None:
    frames = torch.stack([as_tensor(picture(320, 240, i)) for i in range(2)])
    rects = torch.tensor([[30, 40, 200, 210], [31, 41, 190, 200]])
    assert torch.equal(crop_faces(frames.to(memory_format=layout), rects), crop_faces(frames, rects))


def test_edges_of_the_crop_are_repeated_not_the_frames_pixels() -> None:
    frames = torch.full((1, 3, 100, 100), 255, dtype=torch.uint8)
    frames[:, :, 20:60, 20:60] = 7
    assert crop_faces(frames, torch.tensor([[20, 20, 60, 60]])).unique().tolist() == [7]


def test_floating_point_is_not_rounded_and_has_gradients() -> None:
    frames = torch.rand(2, 3, 40, 50, dtype=torch.float64, requires_grad=True)
    rects = torch.tensor([[5, 6, 30, 31], [0, 0, 40, 40]])
    crops = crop_faces(frames, rects)
    assert crops.dtype == torch.float64
    crops.sum().backward()
    gradient = frames.grad
    assert gradient is not None
    assert gradient[0, :, 6:31, 5:30].abs().min() > 0
    assert gradient[0, :, :6].abs().max() == 0


def test_face_input_is_the_pair_in_bgr(device: torch.device) -> None:
    crops = torch.randint(0, 256, (2, 3, 328, 328), dtype=torch.uint8)
    pair = face_input(crops.to(device)).cpu()
    assert pair.shape == (2, 6, 320, 320)
    assert pair.dtype == torch.float32
    inner = crops[:, [2, 1, 0], 4:324, 4:324].numpy().astype(np.float32) / 255
    ulp = 0 if device.type == "cpu" else 1  # torch divides by 255 by multiplying on a GPU
    np.testing.assert_array_max_ulp(pair[:, :3].numpy(), inner, ulp)
    masked = np.stack([cv2.rectangle(x.transpose(1, 2, 0).copy(), (5, 5, 310, 305), (0, 0, 0), -1) for x in inner])
    np.testing.assert_array_max_ulp(pair[:, 3:].numpy(), masked.transpose(0, 3, 1, 2), ulp)


@pytest.mark.parametrize(
    ("crops", "words"),
    [
        (torch.zeros(1, 3, 328, 328, dtype=torch.bool), "uint8 or floating point, given torch.bool"),
        (torch.zeros(1, 3, 328, 328, dtype=torch.int32), "uint8 or floating point"),
        (torch.zeros(1, 3, 320, 320), r"crops are \(B,3,328,328\)"),
        (np.zeros((1, 3, 328, 328), np.uint8), "crops: give a tensor, not ndarray"),
    ],
)
def test_face_input_of_something_else(crops: torch.Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        face_input(crops)


FRAMES = torch.zeros(2, 3, 50, 60, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("frames", "rects", "words"),
    [
        (FRAMES[0, 0], [[0, 0, 9, 9]], r"frames are \(B,3,H,W\), or NV12 \(B,H\*3/2,W\)"),
        (FRAMES[0], [[0, 0, 9, 9]], r"surfaces are \(B,H\*3/2,W\)"),
        (FRAMES.int(), [[0, 0, 9, 9]] * 2, "uint8 or floating point"),
        (FRAMES, [[0, 0, 9, 9]], r"rects are \(2,4\) integers"),
        (FRAMES, [[0.0, 0, 9, 9]] * 2, "integers"),
        (FRAMES, [[0, 0, 9, 9], [0, 0, 61, 9]], "rectangle 1.*leaves the frame of 60×50"),
        (FRAMES, [[-1, 0, 9, 9], [0, 0, 9, 9]], "rectangle 0"),
        (FRAMES, [[9, 0, 9, 9], [0, 0, 9, 9]], "is empty"),
        (FRAMES, [[0, 9, 9, 0], [0, 0, 9, 9]], "is empty"),
    ],
)
def test_bad_arguments(frames: torch.Tensor, rects: list[list[float]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        crop_faces(frames, torch.tensor(rects))


@pytest.mark.gpu
def test_rectangles_on_the_gpu_are_refused() -> None:
    with pytest.raises(ValueError, match="keep them there"):
        crop_faces(FRAMES.cuda(), torch.tensor([[0, 0, 9, 9]] * 2, device="cuda"))


@pytest.mark.gpu
def test_crop_and_paste_do_not_wait_for_the_gpu() -> None:
    from gpurender import paste_faces

    frames = torch.randint(0, 256, (4, 3, 240, 320), dtype=torch.uint8, device="cuda")
    rects = torch.tensor([[10, 10, 100, 100], [20, 20, 111, 111], [10, 10, 100, 100], [0, 0, 240, 240]])
    predictions = torch.rand(4, 3, 320, 320, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        crops = crop_faces(frames, rects)
        face_input(crops)
        paste_faces(frames, crops, predictions, rects)
    finally:
        torch.cuda.set_sync_debug_mode("default")
