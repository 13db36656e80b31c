"""How well the avatar speaks: its mouth measured in rendered frames against what the phonemes ask for."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from ..audio import load_features
from ..audio_engine import load_audio_engine
from ..choose_engine import load_engine
from ..find import find_audio_encoder, find_network
from ..render import render
from ..template import frame_order, open_template
from .corpus import FPS, HELD_OUT_SENTENCES, HELD_OUT_VOICES
from .mouth import PARAMETERS, gestures, mouth_curve
from .speech import PAUSE, Speech, speak

STRIP = 5  # half the width of the strip through the mouth's middle, pixels


def opening(frames: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
    """How far the avatar's lips are apart: height of teeth, tongue and darkness between them, in pixels.

    Told by colour, in a strip from the nose (landmark 60) to the chin (16) through the middle of the mouth: the tongue
    has hardly any green, darkness and teeth hardly any colour; lips and skin have both.

    Args:
        frames: (n,H,W,3) uint8 RGB.
        landmarks: (n,110,2) of the template's frames that they were made from.
    """
    heights = []
    for frame, points in zip(frames, landmarks, strict=True):
        x = round(float(points[[90, 96], 0].mean()))
        top, bottom = int(points[60, 1]) + 6, int(points[16, 1])
        red, green, blue = np.moveaxis(frame[top:bottom, x - STRIP : x + STRIP + 1].astype(int), 2, 0)
        heights.append(((green < 62) | (red - blue < 56)).sum(0).mean())
    return np.asarray(heights)


@dataclass(frozen=True)
class Agreement:
    """How a measured opening follows the wanted one.

    Attributes:
        correlation: at the best lag.
        lag_frames: of the measured opening behind the wanted one, of those within ±5 frames the best.
    """

    correlation: float
    lag_frames: int


def agreement(measured: np.ndarray, wanted: np.ndarray) -> Agreement:
    """Compare two openings (n,) over time."""
    by_lag = {}
    for lag in range(-5, 6):
        a = measured[max(lag, 0) : len(measured) + min(lag, 0)]
        b = wanted[max(-lag, 0) : len(wanted) + min(-lag, 0)]
        by_lag[lag] = float(np.corrcoef(a, b)[0, 1])
    best = max(by_lag, key=by_lag.__getitem__)
    return Agreement(by_lag[best], best)


def rendered(speech: Speech, bundle: Path) -> tuple[np.ndarray, list[int]]:
    """The avatar says something, by the renderer's real path: frames (n,H,W,3) uint8 RGB, and which of the template's
    frames they were made from."""
    avatar = bundle / "avatar"
    template = open_template(avatar)
    with tempfile.TemporaryDirectory() as directory:
        sound = Path(directory) / "speech.wav"
        soundfile.write(sound, speech.samples, speech.sample_rate)
        features = load_features(sound, encoder=load_audio_engine(find_audio_encoder(avatar)))
        engine = load_engine(find_network(avatar), mode=features.mode, precision="fp32")
        frames = np.concatenate([batch.permute(0, 2, 3, 1).numpy() for batch in render(template, features, engine)])
    return frames, frame_order(len(template), range(len(frames)))


def landmarks(bundle: Path) -> np.ndarray:
    """(N,110,2) of the template's frames."""
    files = sorted((bundle / "avatar" / "landmarks").glob("*.lms"), key=lambda file: int(file.stem))
    return np.stack([np.loadtxt(file) for file in files])


@dataclass(frozen=True)
class Articulation:
    """What a rendered sentence's mouth does.

    Attributes:
        opening: of the lips in every frame, pixels.
        wanted: the same in 0..1, as the phonemes ask for.
        agreement: of the two.
        closures: bilabials, and how many of them close the lips: to less than a fifth of the mean opening.
        pauses: frames inside pauses, 0.2 s and more from speech, and how many of them have open lips.
    """

    opening: np.ndarray
    wanted: np.ndarray
    agreement: Agreement
    closures: tuple[int, int]
    pauses: tuple[int, int]


def articulation(speech: Speech, frames: np.ndarray, points: np.ndarray) -> Articulation:
    """Measure a rendered sentence.

    Args:
        speech: what is said.
        frames: (n,H,W,3) uint8 RGB, 25 a second.
        points: (n,110,2) landmarks of the template's frame behind each.
    """
    times = np.arange(len(frames)) / FPS
    wanted = mouth_curve(speech.phonemes, times)[:, PARAMETERS.index("open")]
    measured = opening(frames, points)
    shut = measured.mean() / 5
    bilabials = [(start, end) for viseme, start, end in gestures(speech.phonemes) if viseme == "p b m"]
    closed = 0
    for start, end in bilabials:  # within the closure, give or take a frame
        during = (times > start - 1 / FPS) & (times < end + 1 / FPS)
        closed += bool(measured[during].min() < shut)
    pausing = np.zeros(len(frames), bool)
    for phoneme in speech.phonemes:
        if phoneme.name == PAUSE:
            begins = phoneme.start_seconds + (0.2 if phoneme.start_seconds > 0 else 0)
            ends = phoneme.end_seconds - (0.2 if phoneme is not speech.phonemes[-1] else 0)
            pausing |= (times >= begins) & (times <= ends)
    opened = int((measured[pausing] >= shut).sum())
    return Articulation(
        measured, wanted, agreement(measured, wanted), (len(bilabials), closed), (int(pausing.sum()), opened)
    )


def mouth_region(points: np.ndarray) -> tuple[int, int, int, int]:
    """The rectangle `(x0,y0,x1,y1)` from the nose's base (landmark 60) to below the lowered chin (16), and as wide as
    the lips (90 to 96) and a quarter more."""
    half = 0.625 * (points[96, 0] - points[90, 0])
    middle = (points[96, 0] + points[90, 0]) / 2
    return int(middle - half), int(points[60, 1]), int(middle + half), int(points[16, 1]) + 30


def measure_held_out(bundle: Path) -> Iterator[str]:
    """Say every held-out sentence in every held-out voice; yields a table, line by line."""
    from .scene import draw  # needs more of the system than the rest: only here

    points = landmarks(bundle)
    yield "voice      correlation  lag  closed   open in pauses  PSNR mouth  PSNR face  sentence"
    closures = closed = 0
    mouth_errors: list[float] = []
    for voice in HELD_OUT_VOICES:
        for sentence in HELD_OUT_SENTENCES:
            speech = speak(sentence, voice, 155, pause_seconds=0.5)
            frames, shown = rendered(speech, bundle)
            result = articulation(speech, frames, points[shown])
            mouths = mouth_curve(speech.phonemes, np.arange(len(frames)) / FPS)
            errors: dict[str, list[float]] = {"mouth": [], "face": []}
            for frame, number, mouth in zip(frames, shown, mouths, strict=True):
                truth = draw(number, dict(zip(PARAMETERS, mouth.tolist(), strict=True))).astype(int)
                difference = (frame - truth) ** 2
                x0, x1 = points[number, [1, 31], 0].astype(int)
                y0 = int(points[number, 52, 1])
                for name, rect in (("mouth", mouth_region(points[number])), ("face", (x0, y0, x1, y0 + x1 - x0))):
                    errors[name].append(difference[rect[1] : rect[3], rect[0] : rect[2]].mean())
            mouth_errors += errors["mouth"]
            psnr = {name: psnr_db(values) for name, values in errors.items()}
            closures, closed = closures + result.closures[0], closed + result.closures[1]
            yield (
                f"{voice:10} {result.agreement.correlation:11.3f} {result.agreement.lag_frames:4d} "
                f"{result.closures[1]:3d}/{result.closures[0]:<3d} {result.pauses[1]:6d} of {result.pauses[0]:<5d} "
                f"{psnr['mouth']:11.1f} {psnr['face']:10.1f}  {sentence[:40]}…"
            )
    yield f"all: {closed} of {closures} bilabials closed, PSNR of the mouth {psnr_db(mouth_errors):.1f} dB"


def psnr_db(errors: list[float]) -> float:
    """Of frames with these mean squared errors, all together, for values to 255."""
    return float(10 * np.log10(255**2 / np.mean(errors)))
