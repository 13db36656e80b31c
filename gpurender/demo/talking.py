"""Training, second part: the U-Net learns to draw the mouth that the audio model hears."""

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..crop import BORDER, CROP, crop_faces, face_input
from ..cubic import resize_cubic
from ..network import UNet
from ..template import Template
from .corpus import Recording
from .hearing import AUDIO_WIDTHS, LOOKED_AT, SEGMENT, SEGMENTS, Hearing, in_bfloat16, segments
from .mouth import HIGHEST, LOWEST, PARAMETERS
from .scene import draw

UNET_WIDTHS = {
    "encoder": (8, 8, 16, 32, 64, 96),
    "audio": AUDIO_WIDTHS,
    "fuse": (96, 64),
    "decoder": (48, 24, 16, 8, 8),
}

CLEAN = 0.4  # share of what is heard for the drawn mouths, as it is
NEARLY_SHUT = 0.02, 0.10  # openings: this is shut, this is not, and in between one goes over into the other
MOUTHS = 24  # drawn for each frame of the template
FRAMES_AT_ONCE, MOUTHS_AT_ONCE = 4, 4

# Part of the picture that a step looks at, at half its resolution. Mostly the mouth and the chin: the rest is a copy.
WINDOW = 88, 96
MOUTH_AT = 40, 32
MOUTH_SHARE = 0.55
EDGE = 4  # pixels of a window, at half resolution, that lack neighbours

# The mask's edge is drawn over, and must not show: what lies about it counts for more.
SEAM = 14
SEAM_WEIGHT = 6.0


@dataclass(frozen=True)
class Portraits:
    """Faces of the template, and how they are to look with what was heard.

    Attributes:
        crops: (N,3,328,328) uint8 RGB, the template's faces.
        heard: (N,M,C,10,10) what the audio model says.
        faces: (N,M,3,320,320) uint8 BGR, the drawing with the mouth that this means.
    """

    crops: Tensor
    heard: Tensor
    faces: Tensor


def portraits(template: Template, hearing: Hearing, recordings: Sequence[Recording], seed: int) -> Portraits:
    """Draw every frame of the template with `MOUTHS` mouths that were heard in recordings.

    The mouths are what hearing reads from the sound, not what the phonemes ask for: so the U-Net learns one picture
    for one thing heard, and draws it crisply; how right it is, is hearing's part.
    """
    count, rects = len(template), template.rects.tolist()
    crops = torch.cat([crop_faces(template.frames([i])[0], template.rects[i : i + 1]) for i in range(count)])
    heard, mouths = heard_mouths(hearing, recordings, count * MOUTHS, seed)
    jobs = [(k // MOUTHS, mouths[k].tolist(), rects[k // MOUTHS]) for k in range(count * MOUTHS)]
    with ProcessPoolExecutor() as pool:
        drawn = tqdm(pool.map(draw_face, jobs, chunksize=64), desc="drawing mouths", total=len(jobs), unit=" faces")
        faces = torch.stack([torch.from_numpy(face) for face in drawn])
    return Portraits(crops, heard.unflatten(0, (count, MOUTHS)), faces.unflatten(0, (count, MOUTHS)))


def draw_face(job: tuple[int, list[float], tuple[int, int, int, int]]):
    """(3,320,320) uint8 BGR of the drawing, through the renderer's own crop and resize."""
    torch.set_num_threads(1)  # in worker processes, of which there is one for each core
    frame, mouth, rect = job
    pixels = torch.from_numpy(draw(frame, dict(zip(PARAMETERS, mouth, strict=True)), rect)).permute(2, 0, 1)
    face = resize_cubic(pixels[None], (CROP, CROP))[0]
    return face[:, BORDER:-BORDER, BORDER:-BORDER].flip(0).numpy()


@torch.no_grad()
def heard_mouths(hearing: Hearing, recordings: Sequence[Recording], count: int, seed: int) -> tuple[Tensor, Tensor]:
    """What the audio model says (count,C,10,10) of frames from recordings, and the mouths (count,8) that it means."""
    generator = torch.Generator().manual_seed(seed)
    heard, mouths = [], []
    while sum(map(len, heard)) < count:
        windows, silent, _ = segments(recordings, SEGMENTS, CLEAN, generator)
        frames = torch.randperm(SEGMENT, generator=generator)[:LOOKED_AT]
        pictures = hearing.heard(hearing.features(windows, silent), frames).flatten(0, 1)
        heard.append(pictures)
        mouths.append(decided(hearing.read(pictures)))
    return torch.cat(heard)[:count], torch.cat(mouths)[:count]


def decided(mouths: Tensor) -> Tensor:
    """Mouths (n,8) as they are drawn: within their ranges, and lips that are as good as shut are shut.

    What is learnt by least squares never quite reaches the end of a range: shut lips are read as 0.01 to 0.05 open.
    """
    mouths = mouths.clamp(torch.tensor(LOWEST), torch.tensor(HIGHEST))
    lips = mouths[:, PARAMETERS.index("open")]
    certain = ((lips - NEARLY_SHUT[0]) / (NEARLY_SHUT[1] - NEARLY_SHUT[0])).clamp(0, 1)
    lips *= certain.square() * (3 - 2 * certain)
    return mouths


def untaught(hearing: Hearing, seed: int) -> UNet:
    """The U-Net before it learns to draw, with hearing's audio model in it."""
    torch.manual_seed(seed)
    unet = UNet(**UNET_WIDTHS)
    unet.audio_model.load_state_dict(hearing.audio_model.state_dict())
    return unet


def train_talking(
    unet: UNet, data: Portraits, steps: int, rate: float, squares: float, windows: bool, device: torch.device, seed: int
) -> UNet:
    """One round of learning to draw.

    Args:
        unet: what was learnt in earlier rounds; its audio model stays as it is.
        data: to learn from.
        steps: of the optimizer.
        rate: the highest learning rate of the round.
        squares: weight of squared differences beside absolute ones: the lips' edges are where these are large.
        windows: whether steps see a part of the picture only. The batch norms then stand still, and it is the same
            mathematics on a third of the pixels; the first round sees whole pictures, and settles them.
        device: where to train.
        seed: of what is random.

    Returns:
        the network in eval mode on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    unet = unet.train(not windows).to(device).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    learning = [p for name, p in unet.named_parameters() if not name.startswith("audio_model")]
    optimizer = torch.optim.AdamW(learning, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.15)
    importance = torch.full((1, 1, 320, 320), SEAM_WEIGHT, device=device)
    importance[:, :, SEAM:-SEAM, SEAM:-SEAM] = 1
    for _ in (bar := tqdm(range(steps), desc="learning to talk", unit=" steps")):
        frames = torch.randint(len(data.crops), (FRAMES_AT_ONCE,), generator=generator)
        mouths = torch.randint(MOUTHS, (FRAMES_AT_ONCE, MOUTHS_AT_ONCE), generator=generator)
        top, left = window_corner(generator) if windows else (0, 0)
        size = WINDOW if windows else (160, 160)
        inputs = face_input(data.crops[frames]).to(device, memory_format=torch.channels_last)
        heard = data.heard[frames[:, None], mouths].flatten(0, 1).to(device)
        with in_bfloat16(device):
            drawn = draw_window(unet, inputs, heard, top, left, *size)
        wanted = data.faces[frames[:, None], mouths].flatten(0, 1)
        window = (2 * top, 2 * (top + size[0])), (2 * left, 2 * (left + size[1]))
        true = tuple(true_part(*span) for span in zip((top, left), size, strict=True))
        difference = (drawn - cut(wanted, window).to(device).float() / 255)[:, :, *true]
        weights = cut(importance, window)[:, :, *true]
        loss = (weights * (difference.abs() + squares * difference.square())).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learning, 0.5)
        optimizer.step()
        schedule.step()
        bar.set_postfix_str(f"{255 * difference.abs().mean().item():.2f} levels off", refresh=False)
    return unet.eval().cpu()


def window_corner(generator: torch.Generator) -> tuple[int, int]:
    """(top, left) of a window at half resolution: about the mouth, or anywhere, and often at the picture's edges."""
    if torch.rand((), generator=generator) < MOUTH_SHARE:
        jitter = torch.randint(-4, 5, (2,), generator=generator)
        return MOUTH_AT[0] + int(jitter[0]), MOUTH_AT[1] + int(jitter[1])
    top, left = (
        int(torch.randint(-size // 2, 160 - size // 2, (), generator=generator).clamp(0, 160 - size)) for size in WINDOW
    )
    return top, left


def true_part(start: int, length: int) -> slice:
    """The pixels of a window's side that have all their neighbours: all but those at its ends within the picture."""
    return slice(2 * EDGE if start > 0 else 0, 2 * length - (2 * EDGE if start + length < 160 else 0))


def draw_window(unet: UNet, faces: Tensor, heard: Tensor, top: int, left: int, height: int, width: int) -> Tensor:
    """`UNet.forward` with several mouths for each face, its two finest levels in a window only.

    Args:
        faces: (N,6,320,320).
        heard: (N·M,C,10,10), M mouths for each face, of the audio model.
        top, left, height, width: the window at half resolution.

    Returns:
        (N·M,3,2·height,2·width) float32.
    """
    mouths = len(heard) // len(faces)
    x1 = unet.inc(faces)
    x2 = unet.down1(x1)
    x3 = unet.down2(x2)
    x4 = unet.down3(x3)
    x5 = unet.down4(x4)
    x6 = unet.down5(x5)

    def each(skip: Tensor) -> Tensor:
        return skip.repeat_interleave(mouths, 0)

    x = unet.fuse_conv(torch.cat([each(x6), heard], 1))
    x = unet.up1(x, each(x5))
    x = unet.up2(x, each(x4))
    x = unet.up3(x, each(x3))
    half = (top, top + height), (left, left + width)
    fine = (2 * top, 2 * (top + height)), (2 * left, 2 * (left + width))
    x = doubled(x, 160, ((0, 80), (0, 80)), half)
    x = unet.up4.conv(torch.cat([x, each(cut(x2, half))], 1))
    x = doubled(x, 320, half, fine)
    x = unet.up5.conv(torch.cat([x, each(cut(x1, fine))], 1))
    with torch.autocast(x.device.type, enabled=False):
        return torch.sigmoid(unet.outc(x.float()))


Window = tuple[tuple[int, int], tuple[int, int]]
"""(first, end) of the rows and of the columns."""


def cut(x: Tensor, window: Window) -> Tensor:
    rows, columns = window
    return x[:, :, slice(*rows), slice(*columns)]


def doubled(x: Tensor, size: int, window: Window, out: Window) -> Tensor:
    """The window `out` of the bilinear doubling (corners aligned) to `size`² of a picture whose `window` is `x`."""
    down, across = (doubling(size, *spans).to(x) for spans in zip(window, out, strict=True))
    return (down @ x @ across.T).contiguous(memory_format=torch.channels_last)


def doubling(size: int, span: tuple[int, int], out: tuple[int, int]) -> Tensor:
    """(out, span) float32: the interpolation's weights."""
    position = torch.arange(*out, dtype=torch.float64) * (size / 2 - 1) / (size - 1)
    return (1 - (position[:, None] - torch.arange(*span, dtype=torch.float64)).abs()).clamp(min=0).float()
