"""What the mouth does for speech: visemes, and how they run into one another."""

import unicodedata
from collections.abc import Sequence

import numpy as np

from .speech import PAUSE, Phoneme

PARAMETERS = ("open", "jaw", "wide", "round", "press", "tuck", "teeth", "tongue")
"""The mouth's shape: gap between the lips; lowered jaw; corners drawn in (-1) or apart (1); rounded and protruded lips;
lips pressed together; lower lip under the upper teeth; teeth together; raised tongue."""
LOWEST = (0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
HIGHEST = (1.0,) * len(PARAMETERS)

VISEMES: dict[str, tuple[float, ...]] = {
    #            open  jaw   wide  round press tuck  teeth tongue
    "silence": (0.00, 0.00, 0.00, 0.00, 0.00, 0.00, 0.00, 0.00),
    "p b m": (0.00, 0.06, 0.00, 0.00, 1.00, 0.00, 0.00, 0.00),
    "f v": (0.14, 0.10, 0.15, 0.00, 0.00, 1.00, 0.10, 0.00),
    "θ ð": (0.32, 0.22, 0.10, 0.00, 0.00, 0.00, 0.35, 1.00),
    "t d": (0.28, 0.18, 0.15, 0.00, 0.00, 0.00, 0.60, 0.55),
    "n l": (0.36, 0.28, 0.10, 0.00, 0.00, 0.00, 0.20, 0.85),
    "k ɡ ŋ": (0.36, 0.34, 0.10, 0.00, 0.00, 0.00, 0.10, 0.10),
    "s z": (0.22, 0.06, 0.45, 0.00, 0.00, 0.00, 1.00, 0.10),
    "ʃ ʒ": (0.34, 0.10, -0.45, 0.60, 0.00, 0.00, 0.90, 0.00),
    "ɹ": (0.28, 0.18, -0.35, 0.50, 0.00, 0.00, 0.20, 0.15),
    "h": (0.40, 0.35, 0.10, 0.00, 0.00, 0.00, 0.00, 0.00),
    "iː j": (0.36, 0.16, 0.95, 0.00, 0.00, 0.00, 0.45, 0.20),
    "ɪ": (0.42, 0.30, 0.55, 0.00, 0.00, 0.00, 0.25, 0.15),
    "ɛ æ": (0.70, 0.62, 0.50, 0.00, 0.00, 0.00, 0.00, 0.10),
    "ə ʌ": (0.52, 0.45, 0.10, 0.00, 0.00, 0.00, 0.05, 0.05),
    "ɜː": (0.42, 0.32, -0.10, 0.35, 0.00, 0.00, 0.10, 0.05),
    "ɑː a": (1.00, 1.00, 0.15, 0.00, 0.00, 0.00, 0.00, 0.00),
    "ɔː ɒ": (0.72, 0.68, -0.40, 0.55, 0.00, 0.00, 0.00, 0.00),
    "oʊ": (0.46, 0.40, -0.65, 0.85, 0.00, 0.00, 0.00, 0.00),
    "uː w": (0.24, 0.16, -0.90, 1.00, 0.00, 0.00, 0.00, 0.00),
}
"""Named after English sounds that have them; values of `PARAMETERS`."""

# Letters of the IPA, as espeak-ng writes English and German with them, by viseme.
LETTERS = {
    letter: viseme
    for viseme, letters in {
        "silence": PAUSE,
        "p b m": "pbmβɱ",
        "f v": "fvʋ",
        "θ ð": "θð",
        "t d": "tdɾɽʈɖ",
        "n l": "nlɫɲʎɭɳɬ",
        "k ɡ ŋ": "kɡgŋxχɣçq",
        "s z": "sz",
        "ʃ ʒ": "ʃʒɕʑ",
        "ɹ": "ɹrɻʁ",
        "h": "hɦʔħʕ",
        "iː j": "ijʝ",
        "ɪ": "ɪɨ",
        "ɛ æ": "ɛæe",
        "ə ʌ": "əʌɐᵻɤ",
        "ɜː": "ɜɝɚœø",
        "ɑː a": "ɑaä",
        "ɔː ɒ": "ɔɒ",
        "oʊ": "o",
        "uː w": "uʊwyʏɥʉʍ",
    }.items()
    for letter in letters
}

# How firmly a sound insists on the lips, against its neighbours' demands (dominance), and how fast its influence fades
# (1/s). Closures insist and are quick; an h takes its neighbours' shape.
DOMINANCE: dict[str, tuple[float, float]] = {
    "silence": (2.0, 22.0),
    "p b m": (14.0, 55.0),
    "f v": (8.0, 45.0),
    "ʃ ʒ": (3.0, 25.0),
    "uː w": (3.0, 20.0),
    "h": (0.1, 20.0),
}
USUAL_DOMINANCE = (1.0, 20.0)
CLOSURE_SECONDS = 0.08
"""Lips that close stay closed this long at least: two frames at 25 a second."""


def mouth_curve(phonemes: Sequence[Phoneme], times_seconds: np.ndarray) -> np.ndarray:
    """The mouth's shape at given times.

    Each sound has a target; a parameter is the average of all targets, each weighted with its sound's dominance, which
    is full while it sounds and fades exponentially before and after. After M. M. Cohen and D. W. Massaro, "Modeling
    coarticulation in synthetic visual speech" (1993).

    Args:
        phonemes: of `speak`.
        times_seconds: (n,) when to look.

    Returns:
        (n,8) float32, values of `PARAMETERS`.
    """
    totals = np.zeros((len(times_seconds), len(PARAMETERS)))
    weights = np.zeros((len(times_seconds), 1))
    for viseme, start, end in gestures(phonemes):
        strength, fading = DOMINANCE.get(viseme, USUAL_DOMINANCE)
        # The hold is the middle half of a sound, so that neighbours meet halfway; closures hold for all of it.
        inset = 0.0 if viseme == "p b m" else (end - start) / 4
        distance = np.maximum(np.maximum(start + inset - times_seconds, times_seconds - end + inset), 0)
        weight = (strength * np.exp(-fading * distance))[:, None]
        totals += weight * np.asarray(VISEMES[viseme])
        weights += weight
    return (totals / np.maximum(weights, 1e-9)).astype(np.float32)


def gestures(phonemes: Sequence[Phoneme]) -> list[tuple[str, float, float]]:
    """(viseme, start, end) in seconds: a diphthong or an affricate is two of them, each half as long."""
    found = []
    for phoneme in phonemes:
        visemes = [LETTERS[letter] for letter in unicodedata.normalize("NFC", phoneme.name) if letter in LETTERS]
        for k, viseme in enumerate(visemes):
            step = (phoneme.end_seconds - phoneme.start_seconds) / len(visemes)
            start = phoneme.start_seconds + k * step
            if viseme == "p b m":
                found.append((viseme, *closure(phoneme.name, start, start + step)))
            else:
                found.append((viseme, start, start + step))
    return found


def closure(name: str, start: float, end: float) -> tuple[float, float]:
    """When the lips are closed: espeak-ng's plosives begin with their burst, which is when the lips part again."""
    if name == "p":
        return start - CLOSURE_SECONDS + 0.01, start + 0.01
    if name == "b":
        start -= 0.02
    spare = max(0.0, CLOSURE_SECONDS - (end - start)) / 2
    return start - spare, end + spare
