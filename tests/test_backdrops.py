"""Backdrops against pasting into whole frames and converting them."""

import pytest
import torch
from conftest import MakeTemplate

from gpurender import crop_and_mask, open_template, paste_faces_nv12
from gpurender.backdrops import Backdrops, crop_backdrops, paste_on_backdrops


@pytest.mark.parametrize("size", [(320, 240), (321, 241)])
@pytest.mark.parametrize("parsing", [False, True])
@pytest.mark.parametrize("memory", [0, 400_000, 2**30])
def test_the_same_as_whole_frames_converted(
    make_template: MakeTemplate, size: tuple[int, int], parsing: bool, memory: int
) -> None:
    template = open_template(make_template(width=size[0], height=size[1], parsing=parsing), keep_frames=False)
    indices = [3, 1, 1, 0]
    predictions = torch.rand(4, 3, 320, 320, generator=torch.Generator().manual_seed(0))
    frames, keep = template.frames(indices)
    rects = template.rects[indices]
    crops, inputs = crop_and_mask(frames, rects)
    backdrops = Backdrops(template, range(len(template)), memory)
    for _ in range(2):  # made, then kept where memory allows
        shown = backdrops(indices)
        for given, expected in zip(crop_backdrops(shown), (crops, inputs), strict=True):
            assert torch.equal(given, expected)
        surfaces = paste_on_backdrops(shown, crops, predictions)
        expected = paste_faces_nv12(frames, crops, predictions, rects, keep)
        differing = (surfaces.int() - expected.int()).abs()
        assert differing.max() <= 1
        assert (differing > 0).float().mean() < 1e-4  # ties: see test_face_kernels.py


@pytest.mark.parametrize("parsing", [False, True])
def test_frames_are_decoded_once_while_they_fit(make_template: MakeTemplate, parsing: bool) -> None:
    template = open_template(make_template(width=321, height=241, parsing=parsing), keep_frames=False)
    everything = list(range(len(template)))
    room = 2**30
    enough = Backdrops(template, range(len(template)), room)
    needed = room - enough.memory_left
    asked: list[int] = []
    frames = template.frames
    template.frames = lambda indices: asked.extend(indices) or frames(indices)  # pyright: ignore
    for _ in range(2):
        enough(everything)
    assert asked == everything
    asked.clear()
    just_enough = Backdrops(template, range(len(template)), needed)
    for _ in range(2):
        just_enough(everything)
    assert asked == everything
    asked.clear()
    of_one = Backdrops(template, {1}, room)
    for _ in range(2):
        of_one(everything)
    assert asked == [*everything, *(i for i in everything if i != 1)]
    assert Backdrops(template, (), room).memory_left == room
    asked.clear()
    scarce = Backdrops(template, range(len(template)), needed // 2)
    assert scarce.memory_left == 0
    for _ in range(2):
        scarce(everything)
    again = asked[len(everything) :]
    assert 0.4 * len(everything) <= len(again) <= 0.7 * len(everything)
