"""The bundled avatar as users have it: does it speak, with sentences and a voice that its networks never learnt?"""

from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch
from conftest import tones
from test_demo import draws

from gpurender import find_sound, find_template, load_audio_engine, load_engine, load_features, make, open_template
from gpurender.crop import crop_faces, face_input
from gpurender.demo.corpus import HELD_OUT_SENTENCES, HELD_OUT_VOICES
from gpurender.demo.measure import Articulation, articulation, landmarks, mouth_region, opening, rendered
from gpurender.demo.mouth import PARAMETERS, mouth_curve
from gpurender.demo.speech import Speech, speak
from gpurender.engine import predict
from gpurender.find import BUNDLED, find_audio_encoder, find_network
from gpurender.rectangles import face_rect
from gpurender.render import render

AVATAR = BUNDLED / "avatar"


@pytest.fixture(scope="module")
def speech() -> Speech:
    return speak(HELD_OUT_SENTENCES[0], HELD_OUT_VOICES[0], 155, pause_seconds=0.5)


@pytest.fixture(scope="module")
def spoken(speech: Speech) -> tuple[np.ndarray, list[int]]:
    return rendered(speech, BUNDLED)


@pytest.fixture(scope="module")
def said(speech: Speech, spoken: tuple[np.ndarray, list[int]]) -> Articulation:
    frames, shown = spoken
    return articulation(speech, frames, landmarks(BUNDLED)[shown])


def test_the_mouth_follows_what_is_said(said: Articulation) -> None:
    assert said.agreement.correlation >= 0.85
    assert abs(said.agreement.lag_frames) <= 1


def test_lips_close_for_p_b_and_m(said: Articulation) -> None:
    bilabials, closed = said.closures
    assert bilabials >= 10
    assert closed >= 0.9 * bilabials


def test_silence_keeps_it_shut(said: Articulation) -> None:
    frames, opened = said.pauses
    assert frames >= 12
    assert opened == 0


def test_nothing_outside_the_face_changes(spoken: tuple[np.ndarray, list[int]]) -> None:
    frames, shown = spoken
    template = open_template(AVATAR)
    for k in range(0, len(frames), 10):
        x0, y0, x1, y1 = template.rects[shown[k]].tolist()
        original = template.frames([shown[k]])[0][0].permute(1, 2, 0).numpy().copy()
        difference = np.abs(frames[k].astype(int) - original)
        inside = difference[y0:y1, x0:x1].copy()
        difference[y0:y1, x0:x1] = 0
        assert difference.max() == 0
        assert inside.max() > 0


def test_no_seam_shows_at_the_edge_of_what_is_drawn(spoken: tuple[np.ndarray, list[int]]) -> None:
    """Just inside the edge, what the network drew is what the template has, give or take three levels of 255 along a
    side (measured: 2.5, and 1 in the median)."""
    frames, shown = spoken
    template = open_template(AVATAR)
    for k in range(0, len(frames), 10):
        original, keep = template.frames([shown[k]])
        assert keep is not None
        drawn = ~keep[0].numpy()
        (y0, y1), (x0, x1) = (np.flatnonzero(drawn.any(axis))[[0, -1]] for axis in (1, 0))
        x_left, _, x_right, _ = template.rects[shown[k]].tolist()
        assert x_left < x0 < x1 < x_right  # the margin is kept
        inside = (slice(y0, y1 + 1), slice(x0, x1 + 1))
        difference = frames[k].astype(float)[inside] - original[0].permute(1, 2, 0).numpy()[inside]
        for side in (difference[:6], difference[-6:], difference[:, :6], difference[:, -6:]):
            assert np.abs(side.mean((0, 1))).max() < 3
            assert np.abs(side).mean() < 4.5


@draws
def test_the_rendered_mouth_is_the_drawings_own(speech: Speech, spoken: tuple[np.ndarray, list[int]]) -> None:
    from gpurender.demo.scene import draw

    frames, shown = spoken
    mouths = mouth_curve(speech.phonemes, np.arange(len(frames)) / 25)
    points = landmarks(BUNDLED)
    errors = []
    for k in range(0, len(frames), 3):
        x0, y0, x1, y1 = mouth_region(points[shown[k]])
        truth = draw(shown[k], dict(zip(PARAMETERS, mouths[k].tolist(), strict=True)))[y0:y1, x0:x1]
        errors.append(np.square(frames[k, y0:y1, x0:x1].astype(float) - truth).mean())
    assert 10 * np.log10(255**2 / np.mean(errors)) >= 30


def test_silence_and_tones(tmp_path: Path) -> None:
    """Not speech: digital silence and the faintest noise keep the mouth shut; nothing crashes on a siren."""
    rate = 16000
    noise = np.random.default_rng(0).normal(0, 1e-4, 2 * rate).astype(np.float32)
    openings = {}
    for name, sound in (("silence", np.zeros(2 * rate)), ("hiss", noise), ("tones", tones(2, rate)[:, 0])):
        soundfile.write(tmp_path / f"{name}.wav", sound, rate)
        features = load_features(tmp_path / f"{name}.wav", encoder=load_audio_engine(find_audio_encoder(AVATAR)))
        template = open_template(AVATAR)
        engine = load_engine(find_network(AVATAR))
        frames = torch.cat(list(render(template, features, engine))).permute(0, 2, 3, 1).numpy()
        points = landmarks(BUNDLED)[1 : 1 + len(frames)]
        openings[name] = opening(frames, points)
    assert openings["silence"].max() < 2
    assert openings["hiss"].max() < 2


# --- what is in the box ----------------------------------------------------------------------------------------------


def test_all_that_is_bundled_is_small() -> None:
    assert sum(file.stat().st_size for file in BUNDLED.rglob("*") if "training" not in file.parts) < 12e6


def test_the_template_is_what_was_promised() -> None:
    template = open_template(find_template("avatar"))
    assert (template.width, template.height) == (1280, 720)
    assert len(template) >= 6 * 25
    assert template.notes == []
    sides = template.rects[:, 2] - template.rects[:, 0]
    assert len(set(sides.tolist())) > 5  # the face changes its size
    assert template.rects.max(0).values.sub(template.rects.min(0).values).min() > 10  # and moves


def test_landmarks_give_the_rectangles() -> None:
    rects = open_template(AVATAR).rects.tolist()
    for frame in range(len(rects)):
        file = AVATAR / "landmarks" / f"{frame}.lms"
        assert len(file.read_text().splitlines()) == 110
        assert list(face_rect(file)) == rects[frame]


def test_the_template_loops() -> None:
    """From the last frame to the first is a step like any other."""
    template = open_template(AVATAR)
    frames = torch.cat([template.frames([i])[0] for i in (*range(10), len(template) - 1)]).float()
    steps = (frames[1:10] - frames[:9]).abs().mean((1, 2, 3))
    assert (frames[0] - frames[10]).abs().mean() < 2 * steps.mean()


def test_both_engines_draw_the_same_mouth() -> None:
    """On weights with a meaning: the checkpoint in torch, the export in OpenVINO."""
    template = open_template(AVATAR)
    features = load_features(find_sound("hello"), encoder=load_audio_engine(find_audio_encoder(AVATAR)))
    faces = face_input(crop_faces(template.frames([3, 90])[0], template.rects[[3, 90]]))
    windows = torch.cat([features.windows(30, 31), features.windows(100, 101)])
    openvino = predict(load_engine(find_network(AVATAR), engine="openvino"), faces, windows)
    plain = predict(load_engine(find_network(AVATAR, ".pth"), engine="torch"), faces, windows)
    torch.testing.assert_close(openvino, plain, atol=1e-4, rtol=0)


# --- the names -------------------------------------------------------------------------------------------------------


def test_avatar_says_hello(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    summary = make("avatar", "hello", "hello.mp4", progress=None)
    sound = soundfile.info(find_sound("hello"))
    with av.open(str(tmp_path / "hello.mp4")) as video:
        assert sum(1 for _ in video.decode(video=0)) == summary.frames
        assert video.streams.audio[0].rate == sound.samplerate
    assert summary.frames == pytest.approx(25 * sound.duration, abs=3)
    assert list(tmp_path.iterdir()) == [tmp_path / "hello.mp4"]


def test_a_directory_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "avatar").mkdir()
    (tmp_path / "hello").write_bytes(b"")
    assert find_template("avatar") == Path("avatar")
    assert find_sound("hello") == Path("hello")


def test_other_names_are_paths() -> None:
    assert find_template("anna") == Path("anna")
    assert find_template("somewhere/avatar") == Path("somewhere/avatar")
    assert find_sound("hello.wav") == Path("hello.wav")
