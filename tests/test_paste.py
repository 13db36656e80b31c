import cv2
import numpy as np
import pytest
import torch
from conftest import picture
from hypothesis import given, settings
from hypothesis import strategies as st
from test_crop import as_tensor

from gpurender import crop_faces, paste_faces


def reference_paste(
    image: np.ndarray, crop: np.ndarray, prediction: np.ndarray, rect: list[int], keep: np.ndarray | None
) -> np.ndarray:
    """Steps 5 to 8 of the algorithm as the reference does them, with OpenCV, in RGB."""
    x0, y0, x1, y1 = rect
    face = crop.copy()
    face[4:324, 4:324] = (prediction.transpose(1, 2, 0)[..., ::-1] * 255).astype(np.uint8)
    face = cv2.resize(face, (x1 - x0, y1 - y0), interpolation=cv2.INTER_CUBIC)
    result = image.copy()
    if keep is not None:
        face = np.where(keep[y0:y1, x0:x1, None], result[y0:y1, x0:x1], face)
    result[y0:y1, x0:x1] = face
    return result


@settings(max_examples=25)
@given(st.integers(1, 420), st.integers(1, 420), st.integers(0, 30), st.integers(0, 30), st.booleans())
def test_pastes_are_opencvs_within_one_level(width: int, height: int, x: int, y: int, with_keep: bool) -> None:
    image = picture(450, 450, width)
    rect = [x, y, x + width, y + height]
    frames, rects = as_tensor(image)[None], torch.tensor([rect])
    crops = crop_faces(frames, rects)
    prediction = torch.rand(1, 3, 320, 320, generator=torch.Generator().manual_seed(height))
    keep = torch.rand(1, 450, 450) < 0.3 if with_keep else None
    pasted = paste_faces(frames, crops, prediction, rects, keep)[0].permute(1, 2, 0).numpy()
    expected = reference_paste(
        image,
        crops[0].permute(1, 2, 0).numpy(),
        prediction[0].numpy(),
        rect,
        None if keep is None else keep[0].numpy(),
    )
    difference = np.abs(pasted.astype(int) - expected)
    assert difference.max() <= 1
    outside = np.ones(image.shape[:2], bool)
    outside[rect[1] : rect[3], rect[0] : rect[2]] = False
    if keep is not None:
        outside |= keep[0].numpy()
    assert (pasted[outside] == image[outside]).all()


def test_pasting_a_328_face_of_its_own_restores_the_frame(device: torch.device) -> None:
    frames = torch.stack([as_tensor(picture(400, 360, i)) for i in range(3)]).to(device)
    rects = torch.tensor([[40, 20, 368, 348], [0, 0, 328, 328], [72, 32, 400, 360]])
    crops = crop_faces(frames, rects)
    own = (crops[:, :, 4:324, 4:324].flip(1).float() + 0.5) / 255  # half a level up: predictions are cut
    assert torch.equal(paste_faces(frames, crops, own, rects), frames)


@pytest.mark.parametrize(
    "rect", [[0, 10, 80, 90], [10, 0, 90, 80], [70, 20, 150, 100], [30, 40, 110, 120], [0, 0, 150, 120]]
)
def test_rectangles_may_touch_the_frames_edges(rect: list[int], device: torch.device) -> None:
    frames = as_tensor(picture(150, 120, 3))[None].to(device)
    rects = torch.tensor([rect])
    pasted = paste_faces(frames, crop_faces(frames, rects), torch.ones(1, 3, 320, 320, device=device), rects)
    changed = (pasted != frames).any(1)[0].nonzero()
    assert changed.amin(0).tolist() >= [rect[1], rect[0]]
    assert changed[:, 0].max() < rect[3]
    assert changed[:, 1].max() < rect[2]
    middle = pasted[0, :, (rect[1] + rect[3]) // 2, (rect[0] + rect[2]) // 2]
    assert middle.tolist() == [255, 255, 255]


def test_predictions_are_cut_not_rounded() -> None:
    frames = torch.zeros(1, 3, 328, 328, dtype=torch.uint8)
    rects = torch.tensor([[0, 0, 328, 328]])
    prediction = torch.full((1, 3, 320, 320), 99.99 / 255)
    assert paste_faces(frames, frames, prediction, rects)[0, 0, 100, 100] == 99


def test_channels_come_as_bgr_and_go_as_rgb() -> None:
    frames = torch.zeros(1, 3, 328, 328, dtype=torch.uint8)
    prediction = torch.tensor([1.0, 0.5, 0.0]).view(1, 3, 1, 1).expand(1, 3, 320, 320)
    pasted = paste_faces(frames, frames, prediction, torch.tensor([[0, 0, 328, 328]]))
    assert pasted[0, :, 9, 9].tolist() == [0, 127, 255]


def test_arrays_that_are_read_only_are_not_written_to() -> None:
    array = np.full((1, 3, 400, 400), 7, np.uint8)
    array.flags.writeable = False
    rects = torch.tensor([[20, 20, 220, 220]])
    crops, drawn = crop_faces(array, rects), torch.ones(1, 3, 320, 320)
    with pytest.raises(ValueError, match="the array is read-only"):
        paste_faces(array, crops, drawn, rects, inplace=True)
    assert (array == 7).all()
    assert paste_faces(array, crops, drawn, rects)[0, 0, 100, 100] == 255


def other_strides(frames: torch.Tensor) -> list[torch.Tensor]:
    """The same frames: channels-last, and a part of larger ones."""
    count, _, height, width = frames.shape
    around = torch.zeros(2 * count, 3, height + 9, width + 7, dtype=frames.dtype)
    part = around[::2, :, 5 : height + 5, 3 : width + 3]
    part.copy_(frames)
    return [frames.contiguous(memory_format=torch.channels_last), part]


@pytest.mark.parametrize("keep", [False, True])
def test_frames_of_any_strides_are_pasted_alike(keep: bool) -> None:
    frames = torch.stack([as_tensor(picture(200, 160, seed)) for seed in (0, 1)])
    rects = torch.tensor([[20, 20, 120, 121], [3, 0, 199, 160]])
    crops, drawn = crop_faces(frames, rects), torch.rand(2, 3, 320, 320)
    mask = torch.rand(2, *frames.shape[2:]) > 0.5 if keep else None
    expected = paste_faces(frames, crops, drawn, rects, mask)
    for others in other_strides(frames):
        assert torch.equal(crop_faces(others, rects), crops)
        assert torch.equal(paste_faces(others, crops, drawn, rects, mask), expected)
        assert torch.equal(paste_faces(others, crops, drawn, rects, mask, inplace=True), expected)
        assert torch.equal(others, expected)


def test_in_place_and_not() -> None:
    frames = as_tensor(picture(200, 200, 0))[None]
    before = frames.clone()
    rects = torch.tensor([[20, 20, 120, 120]])
    crops = crop_faces(frames, rects)
    prediction = torch.rand(1, 3, 320, 320)
    pasted = paste_faces(frames, crops, prediction, rects)
    assert torch.equal(frames, before)
    assert paste_faces(frames, crops, prediction, rects, inplace=True) is frames
    assert torch.equal(frames, pasted)


def test_floating_point_is_not_rounded_and_has_gradients() -> None:
    frames = torch.rand(1, 3, 60, 60, dtype=torch.float64)
    rects = torch.tensor([[10, 10, 50, 50]])
    prediction = torch.rand(1, 3, 320, 320, dtype=torch.float64, requires_grad=True)
    pasted = paste_faces(frames, crop_faces(frames, rects), prediction, rects)
    pasted.sum().backward()
    gradient = prediction.grad
    assert gradient is not None
    # Not antialiased: of 8 output pixels a row, each reads 4 of every 8.2 inputs.
    assert 0.1 < (gradient != 0).double().mean() < 0.5


FRAMES = torch.zeros(2, 3, 50, 60, dtype=torch.uint8)
CROPS = torch.zeros(2, 3, 328, 328, dtype=torch.uint8)
PREDICTIONS = torch.zeros(2, 3, 320, 320)
RECTS = torch.tensor([[0, 0, 9, 9]] * 2)


@pytest.mark.parametrize(
    ("crops", "predictions", "keep", "words"),
    [
        (CROPS[:1], PREDICTIONS, None, r"crops are \(2, 3, 328, 328\)"),
        (CROPS.float(), PREDICTIONS, None, "crops are"),
        (CROPS, PREDICTIONS[:, :, :9], None, r"predictions are \(2, 3, 320, 320\)"),
        (CROPS, PREDICTIONS.int(), None, "predictions are"),
        (CROPS, PREDICTIONS, torch.zeros(2, 9, 9, dtype=torch.bool), r"keep is \(2, 50, 60\) bool"),
        (CROPS, PREDICTIONS, torch.zeros(2, 50, 60), "keep is"),
        (CROPS, PREDICTIONS.numpy(), None, "predictions: give a tensor, not ndarray"),
        (CROPS, PREDICTIONS, np.zeros((2, 50, 60), bool), "keep: give a tensor, not ndarray"),
    ],
)
def test_bad_arguments(crops: torch.Tensor, predictions: torch.Tensor, keep: torch.Tensor | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        paste_faces(FRAMES, crops, predictions, RECTS, keep)
