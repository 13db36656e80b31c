"""How much of a template stays in memory, and what is decoded when."""

import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import IMAGES, PARSING, MakeTemplate, opencv

from gpurender import InputError, frame_order, open_template
from gpurender.pictures import keep_mask, read_picture
from gpurender.template import decoded_ahead


@pytest.mark.parametrize("parsing", [False, True])
@pytest.mark.parametrize("resident", [0, 1, 3, 5])
def test_any_budget_gives_the_same_frames(
    make_template: MakeTemplate, decoded: Counter[str], device: torch.device, parsing: bool, resident: int
) -> None:
    frame_bytes = 320 * 240 * (4 if parsing else 3)
    budget = 2 * resident * frame_bytes + frame_bytes if resident else 0
    path = make_template(parsing=parsing)
    template = open_template(path, device=device, memory_budget=budget, decoder="pillow")
    assert template.memory_left == budget - resident * frame_bytes
    assert not decoded
    for indices in ([0, 1, 2], [3, 4], [2, 2, 0], [4, 3, 2, 1, 0]):
        frames, keep = template.frames(indices)
        assert (keep is not None) == parsing
        for n, i in enumerate(indices):
            np.testing.assert_array_equal(frames[n].cpu().numpy(), opencv(path / IMAGES / f"{i}.jpg"))
            if keep is not None:
                mask = keep_mask(read_picture(path / PARSING / f"{i}.png"))
                assert torch.equal(keep[n].cpu(), mask)
    uses = [3, 2, 3, 2, 2]
    expected = {f"{IMAGES}/{i}.jpg": 1 if i < resident else uses[i] for i in range(5)}
    expected |= {f"{PARSING}/{i}.png": 1 if i < resident else uses[i] for i in range(5) if parsing}
    assert decoded == expected


def test_plenty_of_memory_is_not_all_taken(make_template: MakeTemplate, device: torch.device) -> None:
    template = open_template(make_template(), device=device, memory_budget=2**30)
    assert template.memory_left == 2**30 - 5 * 320 * 240 * 3


@pytest.mark.parametrize(("free", "budget"), [(None, 512), (600, 150), (900, 388), (1024, 512), (8192, 2048)])  # MiB
def test_the_default_budget_is_a_quarter_of_what_is_free(
    make_template: MakeTemplate, monkeypatch: pytest.MonkeyPatch, free: int | None, budget: int
) -> None:
    monkeypatch.setattr("gpurender.template.free_memory", lambda: None if free is None else free * 2**20)
    path = make_template()
    assert open_template(path, keep_frames=False).memory_left == budget * 2**20
    monkeypatch.setattr("gpurender.template.CPU_MEMORY_BUDGET", 5 * 320 * 240 * 3 - 1)
    assert open_template(path, keep_frames=False).memory_left == 0  # a large template is to stay small in memory


def test_default_budget_keeps_a_small_template(make_template: MakeTemplate, decoded: Counter[str]) -> None:
    template = open_template(make_template())
    for _ in range(2):
        template.frames(range(5))
    assert set(decoded.values()) == {1}
    assert template.memory_left > 256 * 2**20


@pytest.mark.parametrize("resident", [0, 3, 5])
def test_frames_that_stay_are_decoded_ahead(
    make_template: MakeTemplate, device: torch.device, decoded: Counter[str], resident: int
) -> None:
    path = make_template(parsing=True)
    template = open_template(path, device=device, memory_budget=2 * resident * 320 * 240 * 4, decoder="pillow")
    order = list(dict.fromkeys(frame_order(5, range(40))))
    with decoded_ahead(template, order):
        deadline = time.monotonic() + 10
        while len(decoded) < 2 * resident and time.monotonic() < deadline:
            time.sleep(0.01)
    first = {
        f"{folder}/{i}.{kind}": 1 for folder, kind in ((IMAGES, "jpg"), (PARSING, "png")) for i in order[:resident]
    }
    assert decoded == first
    frames, keep = template.frames(order[:resident] or [0])
    expected, masks = open_template(path, device=device, decoder="pillow").frames(order[:resident] or [0])
    assert torch.equal(frames, expected)
    assert keep is not None
    assert masks is not None
    assert torch.equal(keep, masks)


def test_who_no_longer_wants_frames_ahead_waits_for_few(
    make_template: MakeTemplate, decoded: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpurender.template.AHEAD", 1)
    template = open_template(make_template(), memory_budget=2**30)
    begun, may_go, whole = threading.Event(), threading.Event(), template.keep

    def keep(indices: list[int]) -> None:
        begun.set()
        may_go.wait()
        whole(indices)

    monkeypatch.setattr(template, "keep", keep)
    with decoded_ahead(template, range(5)):
        assert begun.wait(10)
        threading.Timer(0.1, may_go.set).start()
    assert sum(decoded.values()) == 1


def test_what_cannot_be_decoded_ahead_is_told_when_it_is_used(make_template: MakeTemplate) -> None:
    path = make_template()
    (path / IMAGES / "3.jpg").write_bytes((path / IMAGES / "3.jpg").read_bytes()[:700])
    template = open_template(path, memory_budget=2**30)
    with decoded_ahead(template, range(5)):
        pass
    assert len(template.frames([0, 1, 2, 4])[0]) == 4
    with pytest.raises(InputError, match=r"3\.jpg is corrupt or truncated"):
        template.frames([3])


@pytest.mark.parametrize("indices", [[], [5], [-1], [0, 9]])
def test_frames_that_are_not_there(make_template: MakeTemplate, indices: list[int]) -> None:
    template = open_template(make_template())
    assert len(template.frames(torch.tensor([4, 0]))[0]) == 2  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"frames are 0 to 4, at least one of them; given \["):
        template.frames(indices)
    with pytest.raises(ValueError, match="frames are 0 to 4"):
        template.keep(indices)


@pytest.mark.parametrize("budget", [0, 2**30])
def test_frames_are_copies(make_template: MakeTemplate, device: torch.device, budget: int) -> None:
    template = open_template(make_template(parsing=True), device=device, memory_budget=budget)
    before = [part.clone() for part in template.frames([1]) if part is not None]
    for part in template.frames([1, 1]):
        assert part is not None
        part[0] = 0
        assert part[1].any()
    after = [part for part in template.frames([1]) if part is not None]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
