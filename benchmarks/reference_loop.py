"""The reference's inference script as a sequential loop: our own plain restatement of what it does, frame by frame.

Nothing runs beside anything else, every picture is read from its file each time it is shown, the network sees one frame
at a time in float32, and the video is written twice: as MJPEG, then as H.264 with the sound. Parity is tested against
the script's own frames (tests/test_benchmarks.py).
"""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import cv2
import librosa
import numpy as np
import torch
from scipy.signal import lfilter

from gpurender import AudioEncoder, InputError, UNet, load_audio_encoder, load_unet

FPS = 25
ENCODED_AT_ONCE = 64  # mel windows


def make_video(template: Path, sound: Path, unet: Path, encoder: Path, out: Path, device: str) -> int:
    """Everything from files to a file; how many frames."""
    network = load_unet(unet).to(device).eval()
    features = hear(sound, load_audio_encoder(encoder).to(device).eval(), device)
    temporary = out.with_name("temporary.avi")
    writer = None
    count = 0
    for frame in frames(template, features, network, device):
        if writer is None:
            height, width = frame.shape[:2]
            writer = cv2.VideoWriter(str(temporary), cv2.VideoWriter.fourcc(*"MJPG"), FPS, (width, height))
        writer.write(frame)
        count += 1
    assert writer is not None
    writer.release()
    join(temporary, sound, out)
    temporary.unlink()
    return count


def join(video: Path, sound: Path, out: Path) -> None:
    """The second encoding, at x264's defaults but for the quality."""
    program = shutil.which("ffmpeg")
    if program is None:
        raise InputError("the reference's loop needs the ffmpeg program, as the reference does; install it.")
    words = [program, "-y", "-loglevel", "error", "-i", str(video), "-i", str(sound)]
    subprocess.run([*words, "-c:v", "libx264", "-c:a", "aac", "-crf", "20", str(out)], check=True)


# --- sound -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def hear(sound: Path, encoder: AudioEncoder, device: str) -> np.ndarray:
    """(N,512) float32: one feature a frame, the first and the last twice."""
    wave, _ = librosa.load(sound, sr=16000)
    mel = mel_of(wave)
    count = int((len(mel) - 16) / 80 * FPS) + 2
    windows = []
    for i in range(count):
        start = int(80 * (i / FPS))
        rows = mel[start : start + 16] if start + 16 <= len(mel) else mel[-16:]
        windows.append(rows.T[None])
    parts = []
    for i in range(0, count, ENCODED_AT_ONCE):
        batch = torch.from_numpy(np.stack(windows[i : i + ENCODED_AT_ONCE])).float().to(device)
        parts.append(encoder(batch).cpu().numpy())
    features = np.concatenate(parts)
    return np.concatenate([features[:1], features, features[-1:]])


def mel_of(wave: np.ndarray) -> np.ndarray:
    """(T,80) of 16 kHz sound."""
    emphasised = np.asarray(lfilter([1, -0.97], [1], wave), np.float32)
    spectrum = np.abs(librosa.stft(emphasised, n_fft=800, hop_length=200, window="hann", pad_mode="constant"))
    bands = librosa.filters.mel(sr=16000, n_fft=800, n_mels=80, fmin=55, fmax=7600) @ spectrum
    level = 20 * np.log10(np.maximum(1e-5, bands)) - 20
    return np.clip(8 * (level + 100) / 100 - 4, -4, 4).T


def window(features: np.ndarray, i: int) -> np.ndarray:
    """(32,16,16): features i-8 to i+7, zeros where there are none."""
    rows = np.zeros((16, 512), np.float32)
    first, last = max(i - 8, 0), min(i + 8, len(features))
    rows[first - i + 8 : last - i + 8] = features[first:last]
    return rows.reshape(32, 16, 16)


# --- pictures --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def frames(
    template: Path, features: np.ndarray, network: UNet, device: str, parsing: bool = False
) -> Iterator[np.ndarray]:
    """(H,W,3) uint8 BGR of each feature."""
    last = len(list((template / "full_body_img").iterdir())) - 1
    shown, step = 0, 1
    for i in range(len(features)):
        if shown >= last:
            step = -1
        if shown <= 0:
            step = 1
        shown = min(shown + step, last)
        frame = read(template / "full_body_img" / f"{shown}.jpg")
        x0, y0, x1, y1 = rectangle(template / "landmarks" / f"{shown}.lms")
        crop = frame[y0:y1, x0:x1]
        original = crop.copy()
        face = cv2.resize(crop, (328, 328), interpolation=cv2.INTER_CUBIC)
        inner = face[4:324, 4:324].copy()
        masked = cv2.rectangle(inner.copy(), (5, 5, 310, 305), (0, 0, 0), -1)
        seen = np.concatenate([inner.transpose(2, 0, 1), masked.transpose(2, 0, 1)]).astype(np.float32) / 255
        heard = window(features, i)
        given = (torch.from_numpy(array)[None].to(device) for array in (seen, heard))
        drawn = forward(network, *given)[0].cpu().numpy().transpose(1, 2, 0) * 255
        face[4:324, 4:324] = np.array(drawn, np.uint8)
        pasted = cv2.resize(face, (x1 - x0, y1 - y0), interpolation=cv2.INTER_CUBIC)
        if parsing:
            kinds = read(template / "parsing" / f"{shown}.png")[y0:y1, x0:x1]
            kept = (kinds == (0, 0, 255)).all(2) | (kinds == (255, 255, 255)).all(2)
            pasted[kept] = original[kept]
        frame[y0:y1, x0:x1] = pasted
        yield frame


def forward(network: UNet, face: torch.Tensor, audio: torch.Tensor) -> torch.Tensor:
    """The whole U-Net once, every layer once: `UNet.forward` computes its first layer in each of its halves."""
    x1 = network.inc(face)
    x2 = network.down1(x1)
    x3 = network.down2(x2)
    x4 = network.down3(x3)
    x5 = network.down4(x4)
    x6 = network.down5(x5)
    x = network.fuse_conv(torch.cat([x6, network.audio_model(audio)], 1))
    x = network.up1(x, x5)
    x = network.up2(x, x4)
    x = network.up3(x, x3)
    x = network.up4(x, x2)
    x = network.up5(x, x1)
    return torch.sigmoid(network.outc(x))


def rectangle(file: Path) -> tuple[int, int, int, int]:
    points = [[int(np.float32(number)) for number in line.split()[:2]] for line in file.read_text().splitlines()]
    x0, y0, x1 = points[1][0], points[52][1], points[31][0]
    return x0, y0, x1, y0 + x1 - x0


def read(file: Path) -> np.ndarray:
    pixels = cv2.imread(str(file))
    if pixels is None:
        raise InputError(f"{file} cannot be read.")
    return pixels
