"""What is said for training: words of two languages that cover their sounds, put together at random, by many voices."""

import random
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soxr
import torch
from torch import Tensor

from ..sound import SAMPLE_RATE, mel_blocks
from .mouth import mouth_curve
from .speech import Speech, speak

FPS = 25

WORDS = Path(__file__).parent / "words"

VOICES = [
    *(
        ("en-us", variant)
        for variant in ("m1", "m3", "m4", "m7", "f1", "f2", "f4", "klatt", "Alex", "linda", "zac", "ed")
    ),
    *(("en", variant) for variant in ("m1", "m5", "m6", "f1", "f5", "klatt3", "adam", "steph", "quincy", "shelby")),
    *(("en-gb-scotland", variant) for variant in ("m8", "f4", "belinda")),
    *(("de", variant) for variant in ("m1", "m3", "m6", "f1", "f2", "f5", "klatt2", "anika", "norbert", "steph2")),
]
"""(language, variant) of espeak-ng. The variants m2 and f3 stay out of training in every language, for tests."""

HELD_OUT_VOICES = ("en-us+f3", "en+m2")
HELD_OUT_SENTENCES = (
    "Maybe the people in that big blue boat would rather stop for lunch, before the storm comes up.",
    "My brother bought a cheap umbrella, but the wind broke it on the bridge.",
    "Please remember to bring both maps; Bob and Emma have never been to Paris.",
    "Five vivid photographs, a thousand thin feathers, and one zebra: what a measure of joy!",
    "She sells fresh shrimp on Sundays. Why do you ask?",
)
"""Never trained on, as these words in these orders, nor in these voices."""


@dataclass(frozen=True)
class Recording:
    """Sound as the network hears it, and what the mouth does with it.

    Attributes:
        mel: (T,80) float32, 80 rows a second, see `mel_blocks`.
        mouth: (n,8) float32, 25 rows a second, see `mouth_curve`.
    """

    mel: Tensor
    mouth: Tensor


def record(speech: Speech) -> Recording:
    """Spoken text as training sees it."""
    samples = soxr.resample(speech.samples, speech.sample_rate, SAMPLE_RATE, quality="HQ")
    mel = torch.cat(list(mel_blocks(iter([samples]), torch.device("cpu"))))
    times = np.arange(int(len(samples) / SAMPLE_RATE * FPS)) / FPS
    return Recording(mel, torch.from_numpy(mouth_curve(speech.phonemes, times)))


def training_sentences(count: int, seed: int) -> Iterator[tuple[str, str, int, int, float]]:
    """Arguments of `speak` for random sentences: text, voice, words a minute, pitch, pause."""
    chance = random.Random(seed)
    english, german = ((WORDS / name).read_text("utf-8").split() for name in ("english.txt", "german.txt"))
    for number in range(count):
        language, variant = VOICES[number % len(VOICES)]
        words = [chance.choice(german if language == "de" else english) for _ in range(chance.randint(4, 14))]
        text = "".join(word + chance.choices((" ", ", ", ". "), (12, 1, 1))[0] for word in words)
        yield text, f"{language}+{variant}", chance.randint(110, 215), chance.randint(20, 80), chance.uniform(0.1, 1.2)


def training_recordings(count: int, seed: int) -> list[Recording]:
    """Random sentences, spoken and heard; the same ones for the same seed."""
    with ProcessPoolExecutor() as pool:
        return list(pool.map(record_sentence, training_sentences(count, seed), chunksize=16))


def record_sentence(sentence: tuple[str, str, int, int, float]) -> Recording:
    torch.set_num_threads(1)  # in worker processes, of which there is one for each core
    return record(speak(*sentence))
