"""Training, first part: the audio encoder and the U-Net's audio model learn to hear what the mouth does."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from ..audio import MEL_WINDOW, WINDOW, mel_starts
from ..network import AudioEncoder, AudioModel
from ..openvino_requests import has_bfloat16
from ..sound import MEL_BANDS, MEL_RATE
from .corpus import Recording
from .mouth import PARAMETERS

ENCODER_WIDTHS = (16, 16, 16, 32, 32, 32, 64, 64, 64, 96, 96, 128, 512)
AUDIO_WIDTHS = (32, 48, 64, 80, 96)

SEGMENT = 40  # frames of sound that follow one another
SEGMENTS = 12  # at once
LOOKED_AT = 16  # of each segment's frames, by the audio model
GLIMPSE = 2  # frames in the middle of one feature's 0.2 s
GLIMPSE_SHARE = 0.5  # of the loss
IMPORTANCE = (4.0, 1.0, 1.0, 1.0, 1.5, 1.0, 0.7, 0.7)  # of each parameter of the mouth
CLOSED_IMPORTANCE = 6.0  # of the opening where lips are pressed together


class Hearing(nn.Module):
    """Mel to the mouth's shape: the two networks that the renderer has, and linear readings of what they say.

    The readings are there for training alone; the U-Net draws from the audio model's picture. The glimpse reads from
    one feature, without its neighbours, what the mouth does meanwhile: it teaches the encoder directly.
    """

    def __init__(self) -> None:
        super().__init__()
        self.encoder = AudioEncoder(ENCODER_WIDTHS)
        self.audio_model = AudioModel("ave", AUDIO_WIDTHS)
        self.reading = nn.Linear(AUDIO_WIDTHS[-1], len(PARAMETERS))
        self.glimpse = nn.Linear(ENCODER_WIDTHS[-1], GLIMPSE * len(PARAMETERS))

    def features(self, windows: Tensor, silent: Tensor) -> Tensor:
        """Mel windows (B,F,80,16) to features (B,F,512); zeros where `silent` (B,F), as beyond a sound's two ends."""
        batch, count = windows.shape[:2]
        features = self.encoder(windows.flatten(0, 1)[:, None]).unflatten(0, (batch, count))
        return features.masked_fill(silent[:, :, None], 0)

    def heard(self, features: Tensor, frames: Tensor | slice = slice(None)) -> Tensor:
        """Features (B,L+15,512) of L frames, 8 before and 7 after them, to what the audio model says of some of the
        frames: (B,F,C,10,10)."""
        heard = features.unfold(1, WINDOW, 1)[:, frames].transpose(2, 3)  # (B,F,16,512)
        pictures = self.audio_model(heard.reshape(-1, 32, 16, 16).contiguous(memory_format=torch.channels_last))
        return pictures.unflatten(0, heard.shape[:2])

    def read(self, pictures: Tensor) -> Tensor:
        """(N,C,10,10) of the audio model to (N,8)."""
        return self.reading(pictures.mean((2, 3)))


def train_hearing(
    hearing: Hearing,
    recordings: Sequence[Recording],
    steps: int,
    rate: float,
    clean: float,
    device: torch.device,
    seed: int,
) -> Hearing:
    """One round of learning from recordings.

    Args:
        hearing: what was learnt in earlier rounds.
        recordings: to learn from.
        steps: of the optimizer.
        rate: the highest learning rate of the round.
        clean: the share of segments that are heard as they are, and not through varied microphones.
        device: where to train.
        seed: of what is random.

    Returns:
        the average of the last steps' weights, in eval mode on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    hearing = hearing.train().to(device).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    average = AveragedModel(hearing, multi_avg_fn=get_ema_multi_avg_fn(0.99), use_buffers=True)
    optimizer = torch.optim.AdamW(hearing.parameters(), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    for _ in (bar := tqdm(range(steps), desc="learning to hear", unit=" steps")):
        windows, silent, mouth = (tensor.to(device) for tensor in segments(recordings, SEGMENTS, clean, generator))
        frames = torch.randperm(SEGMENT, generator=generator)[:LOOKED_AT]
        with in_bfloat16(device):
            features = hearing.features(windows, silent)
            seen = hearing.read(hearing.heard(features, frames).flatten(0, 1)).unflatten(0, (SEGMENTS, LOOKED_AT))
            glimpsed = hearing.glimpse(features).unflatten(2, (GLIMPSE, -1))
        # Feature k hears from (k-1)/25 s on for 0.2 s: frames k+1 and k+2 are in the middle of it.
        meanwhile = mouth[:, 1:].unfold(1, GLIMPSE, 1)[:, : features.shape[1]].transpose(2, 3)
        within = mouth[:, WINDOW // 2 : WINDOW // 2 + SEGMENT][:, frames]
        loss = error(seen, within) + GLIMPSE_SHARE * error(glimpsed, meanwhile)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(hearing.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(hearing)
        bar.set_postfix_str(f"error {loss.item():.4f}", refresh=False)
    return cast(Hearing, average.module.eval().cpu())


def in_bfloat16(device: torch.device) -> torch.autocast:
    """What can be is computed in bfloat16, where the device has it: others imitate it, many times slower."""
    has_it = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else has_bfloat16()
    return torch.autocast(device.type, torch.bfloat16, enabled=has_it)


def error(seen: Tensor, mouth: Tensor) -> Tensor:
    """Mean square of the differences (…,8), weighted by importance."""
    weights = torch.tensor(IMPORTANCE, device=mouth.device).repeat(*mouth.shape[:-1], 1)
    weights[..., 0] *= 1 + CLOSED_IMPORTANCE * mouth[..., PARAMETERS.index("press")]
    return (weights * (seen.float() - mouth).square()).mean()


def segments(
    recordings: Sequence[Recording], count: int, clean: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Random segments of L frames, a share `clean` of them as they are, others heard through varied microphones.

    Returns:
        mel windows (B,L+15,80,16) and silent (B,L+15) of the features that the frames hear, 8 before them and 7 after;
        mouth (B,L+19,8) from 8 frames before them to 10 after.
    """
    windows, silents, mouths = [], [], []
    for _ in range(count):
        recording = recordings[int(torch.randint(len(recordings), (), generator=generator))]
        length = len(recording.mouth)
        first = int(torch.randint(-SEGMENT // 4, length - SEGMENT // 2, (), generator=generator)) - WINDOW // 2
        features = torch.arange(first, first + SEGMENT + WINDOW - 1)
        starts = mel_starts(len(recording.mel))
        rows = starts[(features - 1).clamp(0, len(starts) - 1)]  # feature k hears mel window k-1
        start, stop = int(rows[0]), int(rows[-1]) + MEL_WINDOW
        mel = recording.mel[start:stop]
        if torch.rand((), generator=generator) >= clean:
            mel = varied(mel, generator)
        windows.append(mel.unfold(0, MEL_WINDOW, 1)[rows - start])  # (L+15,80,16)
        silents.append((features < 0) | (features >= len(starts) + 2))
        mouths.append(recording.mouth[torch.arange(first, first + SEGMENT + WINDOW + 3).clamp(0, length - 1)])
    return torch.stack(windows), torch.stack(silents), torch.stack(mouths)


def varied(mel: Tensor, generator: torch.Generator) -> Tensor:
    """The mel (T,80) of the same speech by another throat in another room: formants moved, another tone of the
    microphone, another level, an echo, noise. Synthetic voices are clean; recorded ones are not."""

    def between(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    shift = between(-0.10, 0.10)
    bands = torch.arange(MEL_BANDS) * (1 + shift)
    below = bands.long().clamp(0, MEL_BANDS - 2)
    part = (bands - below).clamp(0, 1)
    mel = mel[:, below] * (1 - part) + mel[:, below + 1] * part

    decibels = (mel + 4) * 12.5 - 80  # 8 levels are 100 dB; the front end takes 20 dB off
    knots = between(-9, 9, 1, 1, 6)
    tone = nn.functional.interpolate(knots, MEL_BANDS, mode="linear", align_corners=True)[0, 0]
    magnitudes = 10 ** ((decibels + tone + between(-18, 12)) / 20)
    if between(0, 1) < 0.4:
        fading = 10 ** (-3 / (between(0.1, 0.5) * MEL_RATE))  # -60 dB after 0.1 to 0.5 s
        tail = (between(0.05, 0.3) * fading ** torch.arange(1, 25))[:, None, None]
        padded = nn.functional.pad(magnitudes, (0, 0, 24, 0))
        echo = sum(tail[k] * padded[23 - k : 23 - k + len(magnitudes)] for k in range(24))
        magnitudes = magnitudes + echo
    floor = between(-100, -40)
    colour = nn.functional.interpolate(between(-10, 10, 1, 1, 4), MEL_BANDS, mode="linear", align_corners=True)[0, 0]
    noise = 10 ** ((floor + colour) / 20) * between(0.3, 1.7, *magnitudes.shape)
    decibels = 20 * torch.log10((magnitudes.square() + noise.square()).sqrt().clamp(min=1e-5))
    return ((decibels + 80) / 12.5 - 4).clamp(-4, 4)
