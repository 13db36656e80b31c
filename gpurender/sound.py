"""A sound file -> mel rows: its samples, 16 kHz and mono, and their spectrum."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import av
import av.error
import numpy as np
import soxr
import torch
from av.audio.stream import AudioStream
from av.container import InputContainer
from torch import Tensor

from .errors import InputError

SAMPLE_RATE = 16_000
MEL_RATE = 80  # mel rows a second
MEL_BANDS = 80
N_FFT, HOP = 800, 200


def open_sound(path: str | Path) -> InputContainer:
    """Open a file that has a sound track."""
    try:
        # absolute: FFmpeg would take `a:b.wav` for a protocol a; tags need not be UTF-8
        container = av.open(str(Path(path).absolute()), metadata_errors="replace")
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such sound file.") from None
    except av.error.FFmpegError as error:
        raise InputError(f"{path} is not sound that can be decoded ({error.strerror}).") from None
    if not container.streams.audio:
        container.close()
        raise InputError(f"{path} has no sound track.")
    if container.streams.audio[0].codec_context is None:
        container.close()
        raise InputError(f"{path} has a sound track that FFmpeg cannot decode; convert it to WAV or AAC first.")
    return container


def decode_sound(path: str | Path, left_out: Callable[[], None] = lambda: None) -> Iterator[np.ndarray]:
    """Decode any file that has sound, as blocks of (n,) float32 samples: mono, 16 kHz, -1..1.

    Channels are averaged, then resampled with soxr's high quality, and a sample of silence ends what does not fill the
    last one (as librosa.load does).

    Args:
        path: of the file.
        left_out: see `decoded_frames`.

    Raises:
        InputError: there is no sound track, nothing in it can be decoded, or it is empty.
    """
    resample: soxr.ResampleStream | None = None
    kind = to_float = None
    rate = total = resampled = 0
    try:
        with open_sound(path) as container:
            for frame in decoded_frames(container, container.streams.audio[0], left_out):
                if resample is None:
                    rate = frame.sample_rate
                    resample = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32", quality="HQ")
                elif frame.sample_rate != rate:
                    raise InputError(f"{path}: the sound changes its sample rate; convert it to one rate first.")
                if to_float is None or kind != (frame.format.name, frame.layout.name):  # may change in joined files
                    kind = (frame.format.name, frame.layout.name)
                    # Interleaved: PyAV reads planes of 8 channels and more wrongly.
                    to_float = av.AudioResampler(format="flt")
                for converted in to_float.resample(frame):
                    channels = converted.layout.nb_channels
                    mono = converted.to_ndarray().reshape(-1, channels).mean(1, dtype=np.float32)
                    if not np.isfinite(mono).all():
                        raise InputError(f"{path}: the sound holds NaN or infinity after {total / rate:.2f} s.")
                    total += len(mono)
                    block = resample.resample_chunk(mono)
                    resampled += len(block)
                    yield block
        if resample is None or total == 0:
            raise InputError(f"{path}: the sound track is empty.")
        rest = resample.resample_chunk(np.empty(0, np.float32), last=True)
        yield np.pad(rest, (0, max(-(-total * SAMPLE_RATE // rate) - resampled - len(rest), 0)))
    except av.error.FFmpegError as error:
        seconds = total / max(rate, 1)
        raise InputError(f"{path}: the sound breaks off after {seconds:.2f} s ({error.strerror}).") from None
    finally:
        resample = None  # an error's traceback would hold it until the program ends, of which it complains


def damage(packets: int) -> list[str]:
    """A note on packets that were left out, if there are any."""
    return [f"what could not be decoded of the sound is left out: {packets} of its packets"] if packets else []


def decoded_frames(
    container: InputContainer, stream: AudioStream, left_out: Callable[[], None] = lambda: None
) -> Iterator[av.AudioFrame]:
    """A sound's frames. Packets that cannot be decoded are left out, if more follows: tags and cuts in joined files,
    and damage.

    Args:
        left_out: is called for each of them.

    Raises:
        av.error.FFmpegError: the sound ends so.
    """
    failed = None
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except av.error.FFmpegError as error:
            if isinstance(error, MemoryError):
                raise
            failed = error
            left_out()
            continue
        if frames:
            failed = None
        yield from cast(list[av.AudioFrame], frames)
    if failed is not None:
        raise failed


def mel_blocks(samples: Iterator[np.ndarray], device: torch.device, block_rows: int = 2400) -> Iterator[Tensor]:
    """Blocks of mel rows (≤ block_rows + 1, 80) float32 in -4..4 on the device, from blocks of 16 kHz samples.

    Wav2Lip's front end, as SyncTalk_2D uses it: pre-emphasis 0.97, STFT 800/200 with a periodic Hann window, centred
    with zeros, magnitude, 80 Slaney bands, decibels scaled to ±4. T = 1 + samples // 200 rows in all.
    """
    window = torch.hann_window(N_FFT, dtype=torch.float32, device=device)
    filters = mel_filters().to(device)
    need = (block_rows - 1) * HOP + N_FFT
    parts = [np.zeros(N_FFT // 2, np.float32)]  # the centring zeros; joined when there is a block of them
    held = N_FFT // 2
    previous = np.float32(0)

    def rows(signal: np.ndarray) -> Tensor:
        spectrum = torch.stft(
            torch.from_numpy(signal).to(device), N_FFT, HOP, window=window, center=False, return_complex=True
        )
        level = 20 * torch.log10((filters @ spectrum.abs()).clamp(min=1e-5)) - 20
        return (8 * (level + 100) / 100 - 4).clamp(-4, 4).T  # (t,80)

    for block in samples:
        if len(block) == 0:
            continue
        before = np.concatenate([[previous], block[:-1]])
        previous = block[-1]
        parts.append(block - np.float32(0.97) * before)
        held += len(block)
        if held < need:
            continue
        pending = np.concatenate(parts)
        while len(pending) >= need:
            yield rows(pending[:need])
            pending = pending[block_rows * HOP :]
        parts, held = [pending], len(pending)
    yield rows(np.concatenate([*parts, np.zeros(N_FFT // 2, np.float32)]))


def mel_filters() -> Tensor:
    """(80,401) float32: triangular mel filters 55 to 7600 Hz, each of area one, on Slaney's scale.

    Source: M. Slaney, Auditory Toolbox (1998): linear below 1 kHz at 200/3 Hz a mel, logarithmic above it.
    """
    step, corner = 200 / 3, 1000.0
    log_step = np.log(6.4) / 27

    def to_mel(hz: float) -> float:
        return hz / step if hz < corner else corner / step + np.log(hz / corner) / log_step

    mels = np.linspace(to_mel(55), to_mel(7600), MEL_BANDS + 2)
    edges = np.where(mels < corner / step, mels * step, corner * np.exp(log_step * (mels - corner / step)))
    bins = np.fft.rfftfreq(N_FFT, 1 / SAMPLE_RATE)
    rising = (bins - edges[:-2, None]) / np.diff(edges)[:-1, None]
    falling = (edges[2:, None] - bins) / np.diff(edges)[1:, None]
    triangles = np.maximum(0, np.minimum(rising, falling))
    return torch.from_numpy((triangles * (2 / (edges[2:] - edges[:-2]))[:, None]).astype(np.float32))
