"""Speech to learn from: espeak-ng speaks sentences and says when each phoneme sounds."""

import ctypes
from dataclasses import dataclass
from functools import cache

import espeakng_loader
import numpy as np

PAUSE = "_"
"""The name of silence among phonemes."""


@dataclass(frozen=True)
class Phoneme:
    """A speech sound: its IPA name without stress and tone marks, and when it sounds."""

    name: str
    start_seconds: float
    end_seconds: float


@dataclass(frozen=True)
class Speech:
    """Spoken text.

    Attributes:
        samples: (n,) float32 in -1..1, mono.
        sample_rate: samples a second.
        phonemes: in order, without gaps, from 0 to the end of the sound.
    """

    samples: np.ndarray
    sample_rate: int
    phonemes: list[Phoneme]


def speak(text: str, voice: str, words_per_minute: int = 160, pitch: int = 50, pause_seconds: float = 0.0) -> Speech:
    """Have espeak-ng speak.

    Args:
        text: one or a few sentences in the voice's language.
        voice: language and variant, such as `en-us+f3` or `de+m2`.
        words_per_minute: 80 to 450.
        pitch: 0 to 99.
        pause_seconds: silence before and after.

    Raises:
        ValueError: espeak-ng has no such voice.
    """
    espeak, rate = library()
    if espeak.espeak_SetVoiceByName(voice.encode()) != 0:
        raise ValueError(f"espeak-ng has no voice {voice!r}")
    espeak.espeak_SetParameter(RATE, words_per_minute, 0)
    espeak.espeak_SetParameter(PITCH, pitch, 0)
    blocks: list[np.ndarray] = []
    events: list[tuple[int, str]] = []

    @CALLBACK
    def collect(wave, count: int, event) -> int:
        if wave and count:
            blocks.append(np.ctypeslib.as_array(wave, (count,)).copy())
        i = 0
        while event[i].type != LIST_TERMINATED:
            if event[i].type == PHONEME:
                events.append((event[i].sample, event[i].name.split(b"\0")[0].decode()))
            i += 1
        return 0

    espeak.espeak_SetSynthCallback(collect)
    encoded = text.encode()
    espeak.espeak_Synth(encoded, len(encoded) + 1, 0, 1, 0, UTF8, None, None)
    espeak.espeak_Synchronize()

    quiet = np.zeros(round(pause_seconds * rate), np.float32)
    samples = np.concatenate([quiet, *(block.astype(np.float32) / 32768 for block in blocks), quiet])
    return Speech(samples, rate, timed(events, len(quiet), len(samples), rate))


def timed(events: list[tuple[int, str]], offset: int, length: int, rate: int) -> list[Phoneme]:
    """Phonemes from (first sample, name): each lasts until the next one; marks without a sound are left out."""
    starts = [(0, PAUSE)]
    for sample, name in events:
        name = name.strip("ˈˌ'ʲ-|?1234567890. ")
        starts.append((sample + offset, name or PAUSE))
    merged = [starts[0]]
    for start in starts[1:]:
        if start[1] != PAUSE or merged[-1][1] != PAUSE:
            merged.append(start)
    ends = [start for start, _ in merged[1:]] + [length]
    return [
        Phoneme(name, start / rate, end / rate) for (start, name), end in zip(merged, ends, strict=True) if end > start
    ]


# --- the library -----------------------------------------------------------------------------------------------------

RATE, PITCH = 1, 3  # espeak_PARAMETER
LIST_TERMINATED, PHONEME = 0, 7  # espeak_EVENT_TYPE
UTF8 = 1
SYNCHRONOUS = 2  # espeak_AUDIO_OUTPUT: sound goes to the callback, before espeak_Synth returns
PHONEME_EVENTS, PHONEME_IPA = 1, 2


class Event(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("name", ctypes.c_char * 8),
    )


CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(Event))


@cache
def library() -> tuple[ctypes.CDLL, int]:
    """espeak-ng and its samples a second; started once, as it keeps its state in the process."""
    espeak = ctypes.CDLL(espeakng_loader.get_library_path())
    data = espeakng_loader.get_data_path().encode()
    rate = espeak.espeak_Initialize(SYNCHRONOUS, 0, data, PHONEME_EVENTS | PHONEME_IPA)
    if rate <= 0:
        raise RuntimeError(f"espeak-ng cannot start with its data in {espeakng_loader.get_data_path()}")
    return espeak, rate
