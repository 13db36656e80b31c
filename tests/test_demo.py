"""How the avatar is made: speech with its phonemes, the mouth's movements, the drawing, the training."""

import copy
import itertools
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from gpurender import InputError, UNet, load_features
from gpurender.demo.__main__ import main
from gpurender.demo.corpus import VOICES, record, training_sentences
from gpurender.demo.hearing import SEGMENT, Hearing, segments, train_hearing, varied
from gpurender.demo.measure import agreement, landmarks, opening
from gpurender.demo.mouth import HIGHEST, LETTERS, LOWEST, PARAMETERS, VISEMES, gestures, mouth_curve
from gpurender.demo.speech import PAUSE, Phoneme, speak
from gpurender.find import BUNDLED

try:
    import skia  # noqa: F401
except ImportError as error:  # the wheel wants libGL and libEGL from the system
    NO_DRAWING = f"skia cannot be loaded ({error}): THE DRAWING IS NOT TESTED HERE"
else:
    NO_DRAWING = ""
draws = pytest.mark.skipif(bool(NO_DRAWING), reason=NO_DRAWING)

OPEN = PARAMETERS.index("open")


# --- speech ----------------------------------------------------------------------------------------------------------


def test_phonemes_fill_the_sound() -> None:
    speech = speak("My mother, the baker.", "en-us+m1", pause_seconds=0.3)
    assert speech.samples.dtype == np.float32
    assert speech.phonemes[0].start_seconds == 0
    assert speech.phonemes[-1].end_seconds == pytest.approx(len(speech.samples) / speech.sample_rate)
    for before, after in itertools.pairwise(speech.phonemes):
        assert before.end_seconds == after.start_seconds
        assert before.end_seconds > before.start_seconds
    names = [phoneme.name for phoneme in speech.phonemes]
    assert names[0] == names[-1] == PAUSE
    assert names.count("m") == 2
    assert names.count("b") == 1


def test_vowels_are_loud_and_pauses_silent() -> None:
    speech = speak("Far away, the calm sea.", "en+f1", pause_seconds=0.3)
    loudness: dict[str, list[float]] = {"pause": [], "vowel": []}
    for phoneme in speech.phonemes:
        start, end = (round(t * speech.sample_rate) for t in (phoneme.start_seconds, phoneme.end_seconds))
        power = float(np.square(speech.samples[start:end]).mean())
        if phoneme.name == PAUSE:
            loudness["pause"].append(power)
        elif phoneme.name[0] in "ɑɐeiɔ":
            loudness["vowel"].append(power)
    assert len(loudness["vowel"]) >= 5
    assert max(loudness["pause"]) < 0.02 * min(loudness["vowel"])


def test_an_unknown_voice_is_refused() -> None:
    with pytest.raises(ValueError, match="espeak-ng has no voice 'xx-nobody'"):
        speak("Hello", "xx-nobody")


@pytest.mark.parametrize("language", sorted({language for language, _ in VOICES}))
def test_every_letter_of_the_training_languages_has_a_viseme(language: str) -> None:
    for text, voice, *_ in itertools.islice(training_sentences(70, seed=1), 70):
        if voice.startswith(f"{language}+"):
            for phoneme in speak(text, voice).phonemes:
                assert any(letter in LETTERS for letter in phoneme.name), phoneme
                assert all(
                    letter in LETTERS or letter in "ː:" or unicodedata.combining(letter) for letter in phoneme.name
                ), phoneme


def test_sentences_are_the_same_for_a_seed() -> None:
    assert list(training_sentences(20, 3)) == list(training_sentences(20, 3))
    assert list(training_sentences(20, 3)) != list(training_sentences(20, 4))


# --- the mouth -------------------------------------------------------------------------------------------------------


def test_visemes() -> None:
    assert len(VISEMES) >= 12
    assert len(set(VISEMES.values())) == len(VISEMES)
    for shape in VISEMES.values():
        assert all(low <= value <= high for low, value, high in zip(LOWEST, shape, HIGHEST, strict=True))


def phonemes_of(names: list[str], seconds: list[float]) -> list[Phoneme]:
    ends = np.cumsum(seconds).tolist()
    return [Phoneme(n, e - s, e) for n, s, e in zip(names, seconds, ends, strict=True)]


@given(
    st.lists(
        st.tuples(st.sampled_from([PAUSE, *"pbmfvθtnksʃɹhiɪɛəɑɔou", "aɪ", "tʃ", "oʊ"]), st.floats(0.03, 0.4)),
        min_size=1,
        max_size=30,
    )
)
def test_curves_stay_within_their_ranges(spoken: list[tuple[str, float]]) -> None:
    phonemes = phonemes_of([n for n, _ in spoken], [s for _, s in spoken])
    curve = mouth_curve(phonemes, np.arange(-0.2, phonemes[-1].end_seconds + 0.2, 0.01))
    assert np.isfinite(curve).all()
    assert (curve >= np.asarray(LOWEST) - 1e-6).all()
    assert (curve <= np.asarray(HIGHEST) + 1e-6).all()


@given(st.sampled_from("mbp"), st.sampled_from("ɑɛɪɔ"), st.sampled_from("ɑɛɪɔ"), st.floats(0, 0.04))
def test_closures_close_at_any_phase_of_the_frames(closure: str, before: str, after: str, phase: float) -> None:
    phonemes = phonemes_of([PAUSE, before, closure, after, PAUSE], [0.3, 0.2, 0.06, 0.2, 0.3])
    curve = mouth_curve(phonemes, np.arange(0, 1, 0.04) + phase)[:, OPEN]
    closing = curve[(np.arange(len(curve)) * 0.04 + phase > 0.40) & (np.arange(len(curve)) * 0.04 + phase < 0.66)]
    assert closing.min() < 0.1 * curve.max()


def test_neighbours_shape_a_sound() -> None:
    """Coarticulation: an s before uː is rounder than an s before iː."""
    rounded = [
        mouth_curve(phonemes_of([PAUSE, "s", vowel, PAUSE], [0.3, 0.12, 0.2, 0.3]), np.array([0.40]))[0]
        for vowel in ("uː", "iː")
    ]
    assert rounded[0][PARAMETERS.index("round")] > rounded[1][PARAMETERS.index("round")] + 0.1
    assert rounded[0][PARAMETERS.index("wide")] < rounded[1][PARAMETERS.index("wide")] - 0.1


def test_a_diphthong_is_two_gestures() -> None:
    assert [viseme for viseme, _, _ in gestures([Phoneme("aɪ", 0, 0.2)])] == ["ɑː a", "ɪ"]


# --- the drawing -----------------------------------------------------------------------------------------------------


@draws
def test_the_template_is_the_drawing() -> None:
    from gpurender import open_template
    from gpurender.demo import build, scene
    from gpurender.demo.character import REST

    template = open_template(BUNDLED / "avatar")
    assert len(template) == scene.FRAMES
    for frame in range(0, scene.FRAMES, 31):
        drawn = torch.from_numpy(scene.draw(frame, REST)).permute(2, 0, 1)
        error = (template.frames([frame])[0][0].float() - drawn).square().mean()
        assert 10 * torch.log10(255**2 / error) > 36
        np.testing.assert_allclose(build.landmarks(frame), landmarks(BUNDLED)[frame], atol=0.051)


@draws
def test_a_part_of_the_drawing_is_cut_from_the_whole() -> None:
    from gpurender.demo.character import REST
    from gpurender.demo.scene import draw

    rect = (490, 330, 790, 630)
    whole = draw(7, REST)[330:630, 490:790].astype(int)
    difference = np.abs(whole - draw(7, REST, rect))
    assert difference.mean() < 0.1
    assert (difference > 2).mean() < 0.005  # skia rasterises edges otherwise where a clip is near


@draws
def test_the_measured_opening_is_the_drawn_one() -> None:
    from gpurender.demo.scene import draw

    points = landmarks(BUNDLED)
    measured = []
    for k, shape in enumerate(VISEMES.values()):
        frame = draw(8 * k, dict(zip(PARAMETERS, shape, strict=True)))
        measured.append(opening(frame[None], points[8 * k][None])[0])
    wanted = np.asarray([shape[OPEN] for shape in VISEMES.values()])
    assert np.corrcoef(measured, wanted)[0, 1] > 0.98
    assert max(m for m, w in zip(measured, wanted, strict=True) if w == 0) == 0


@draws
def test_visemes_look_different() -> None:
    from gpurender.demo.scene import draw

    pictures = [draw(0, dict(zip(PARAMETERS, shape, strict=True)), (560, 400, 720, 560)) for shape in VISEMES.values()]
    differences = [np.abs(a.astype(int) - b).mean() for a, b in itertools.combinations(pictures, 2)]
    assert sum(difference > 0.5 for difference in differences) >= len(differences) - 2


# --- training --------------------------------------------------------------------------------------------------------


def test_segments_are_what_the_renderer_hears(tmp_path: Path) -> None:
    """Training's windows of mel against those that the renderer makes of the same sound."""
    speech = speak("Seven blue birds.", "en-us+m1", pause_seconds=0.3)
    soundfile.write(tmp_path / "s.wav", speech.samples, speech.sample_rate, "FLOAT")
    heard: list[torch.Tensor] = []

    def encoder(mel: torch.Tensor) -> torch.Tensor:
        heard.append(mel)
        return torch.zeros(len(mel), 512)

    features = load_features(tmp_path / "s.wav", encoder=encoder)
    features.windows(0, len(features))
    renderers = torch.cat(heard)[:, 0]  # (n,80,16)

    windows, silent, mouth = segments([record(speech)], 6, 1.0, torch.Generator().manual_seed(0))
    assert mouth.shape == (6, SEGMENT + 19, 8)
    within = windows[~silent]
    assert 100 < len(within) < 6 * (SEGMENT + 15)
    for window in within:
        assert (renderers - window).abs().amax((1, 2)).min() < 1e-3


def test_variation_keeps_the_mels_range() -> None:
    mel = record(speak("Seven blue birds.", "en-us+m1")).mel
    for seed in range(10):
        changed = varied(mel, torch.Generator().manual_seed(seed))
        assert changed.shape == mel.shape
        assert changed.min() >= -4
        assert changed.max() <= 4
        assert (changed - mel).abs().mean() > 0.05


def test_hearing_learns() -> None:
    recordings = [record(speak(*sentence)) for sentence in training_sentences(6, 0)]
    before = Hearing()
    hearing = train_hearing(copy.deepcopy(before), recordings, 2, 1e-3, 0.5, torch.device("cpu"), seed=0)
    assert not hearing.training
    assert all(torch.isfinite(value).all() for value in hearing.state_dict().values())
    for (name, learnt), untaught in zip(hearing.named_parameters(), before.parameters(), strict=True):
        assert not torch.equal(learnt, untaught), name


@draws
def test_talking_learns() -> None:
    from gpurender.demo.talking import Portraits, train_talking, untaught

    generator = torch.Generator().manual_seed(0)
    data = Portraits(
        torch.randint(256, (2, 3, 328, 328), dtype=torch.uint8, generator=generator),
        torch.rand(2, 24, 96, 10, 10, generator=generator),
        torch.randint(256, (2, 24, 3, 320, 320), dtype=torch.uint8, generator=generator),
    )
    hearing = Hearing()
    unet = untaught(hearing, seed=0)
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    for windows in (False, True):
        unet = train_talking(unet, data, 2, 1e-3, 1.0, windows, torch.device("cpu"), seed=0)
        assert not unet.training
    assert any((value != before[name]).any() for name, value in unet.state_dict().items() if "up5" in name)
    for name, value in hearing.audio_model.state_dict().items():
        torch.testing.assert_close(unet.audio_model.state_dict()[name], value)  # it is hearing's, and stays so


@draws
@pytest.mark.parametrize(("top", "left"), [(60, 30), (0, 0), (72, 64), (0, 64)])
def test_a_window_of_the_network_is_cut_from_the_whole(top: int, left: int) -> None:
    from gpurender.demo.talking import UNET_WIDTHS, WINDOW, draw_window, true_part

    torch.manual_seed(0)
    unet = UNet(**UNET_WIDTHS).eval()
    faces, windows = torch.rand(2, 6, 320, 320), torch.rand(4, 32, 16, 16)
    height, width = WINDOW
    with torch.no_grad():
        whole = unet(faces.repeat_interleave(2, 0), windows)
        part = draw_window(unet, faces, unet.audio_model(windows), top, left, height, width)
    expected = whole[:, :, 2 * top : 2 * (top + height), 2 * left : 2 * (left + width)]
    rows, columns = true_part(top, height), true_part(left, width)
    assert part.shape == expected.shape
    torch.testing.assert_close(part[:, :, rows, columns], expected[:, :, rows, columns])


@draws
def test_the_whole_picture_is_a_window() -> None:
    from gpurender.demo.talking import UNET_WIDTHS, draw_window, true_part

    unet = UNet(**UNET_WIDTHS).eval()
    faces, windows = torch.rand(1, 6, 320, 320), torch.rand(2, 32, 16, 16)
    with torch.no_grad():
        drawn = draw_window(unet, faces, unet.audio_model(windows), 0, 0, 160, 160)
        torch.testing.assert_close(drawn, unet(faces.repeat_interleave(2, 0), windows))
    assert true_part(0, 160) == slice(0, 320)


@draws
def test_windows_stay_in_the_picture_and_reach_its_edges() -> None:
    from gpurender.demo.talking import WINDOW, window_corner

    generator = torch.Generator().manual_seed(0)
    corners = [window_corner(generator) for _ in range(300)]
    tops, lefts = (sorted(values) for values in zip(*corners, strict=True))
    assert tops[0] == lefts[0] == 0
    assert tops[-1] == 160 - WINDOW[0]
    assert lefts[-1] == 160 - WINDOW[1]


@draws
def test_lips_that_are_nearly_shut_are_drawn_shut() -> None:
    from gpurender.demo.talking import decided

    mouths = torch.zeros(4, 8)
    mouths[:, OPEN] = torch.tensor([-0.1, 0.02, 0.1, 1.3])
    mouths[:, PARAMETERS.index("wide")] = torch.tensor([-2.0, -0.5, 0.5, 2.0])
    torch.testing.assert_close(decided(mouths)[:, OPEN], torch.tensor([0.0, 0.0, 0.1, 1.0]))
    torch.testing.assert_close(decided(mouths)[:, PARAMETERS.index("wide")], torch.tensor([-1.0, -0.5, 0.5, 1.0]))


def test_agreement_finds_the_lag() -> None:
    wave = np.sin(np.arange(100) / 5) + 0.1 * np.cos(np.arange(100))
    found = agreement(np.roll(wave, 2)[5:-5], wave[5:-5])
    assert found.lag_frames == 2
    assert found.correlation == pytest.approx(1)


@draws
def test_what_another_build_learnt_is_not_taken(tmp_path: Path) -> None:
    from gpurender.demo.build import build

    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "made_by.json").write_text('{"seed": 0, "share": 0.5}')
    for seed, share in ((1, 0.5), (0, 1.0)):
        with pytest.raises(InputError, match="training holds what another build learnt, of .*; delete it"):
            build(tmp_path, torch.device("cpu"), seed, share)
    assert [file.name for file in tmp_path.rglob("*.*")] == ["made_by.json"]


@draws
@pytest.mark.parametrize("share", [0.001, 0.01, 1.0])
def test_a_small_share_is_enough_for_a_schedule(share: float) -> None:
    from gpurender.demo.build import HEARING_ROUNDS, TALKING_ROUNDS, scaled

    for steps in (rounds[0] for rounds in (*HEARING_ROUNDS, *TALKING_ROUNDS)):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1.0)
        torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, scaled(steps, share), pct_start=0.1)


def test_a_trial_does_not_replace_what_is_bundled() -> None:
    result = CliRunner().invoke(main, ["build", "--share", "0.5"])
    assert result.exit_code == 2
    assert "give --out with --share" in result.output


def test_the_commands_explain_themselves() -> None:
    for command, words in (("", "avatar"), ("build", "Draw"), ("measure", "how right")):
        result = CliRunner().invoke(main, [*command.split(), "--help"])
        assert result.exit_code == 0
        assert words in result.output
    result = CliRunner().invoke(main, ["build", "--device", "toaster"])
    assert result.exit_code == 2
    assert "toaster" in result.output


def test_missing_extras_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gpurender.demo.build", None)
    result = CliRunner().invoke(main, ["build"])
    assert result.exit_code == 1
    assert 'pip install "gpurender[demo]"' in result.output
    assert "Traceback" not in result.output
