"""START HERE: everything that is bundled, made from nothing.

template  160 frames of the drawn person, mouth shut, with landmarks     scene.py, character.py, paint.py
speech    random sentences by many voices of espeak-ng                   corpus.py, speech.py
mouth     what the lips do at those phonemes                             mouth.py
hearing   audio encoder and audio model: from mel to the mouth           hearing.py
talking   the U-Net: from template and what is heard to the picture      talking.py
measure   sentences and voices that were not learnt, rendered            measure.py
"""

import json
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import soundfile
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import InputError
from ..export import export_onnx
from ..output import complete_or_absent
from ..pack import write_rectangles, write_video
from ..rectangles import Rect, face_rect
from ..template import open_template
from .character import REST, Head
from .corpus import FPS, training_recordings
from .hearing import Hearing, train_hearing
from .measure import rendered
from .scene import FRAMES, HEIGHT, WIDTH, draw, pose
from .speech import Speech, speak
from .talking import portraits, train_talking, untaught

HELLO = (
    "Hello! I am the avatar of gpurender. Nobody ever filmed me: I am a drawing, and this voice is a machine's. "
    "But my lips move by the real path. Bring your own face, and your own voice, and press enter."
)
HELLO_VOICE, HELLO_WORDS_PER_MINUTE = "en-us+f2", 158
PICTURED_SECONDS = (0.2, 0.72, 1.6, 2.6)

VIDEO_QUALITY = 21  # 42 dB from what is drawn, and the package is to be small
MARGIN = 20 / 328  # of a face rectangle's side

SENTENCES = 3000
HEARING_ROUNDS = ((1300, 3e-3, 0.0), (1000, 1.5e-3, 0.3))
"""Steps, highest learning rate, share of sound that is heard as it is: the second round learns true silence, too."""
TALKING_ROUNDS = ((200, 4e-3, 0.0, False), (1500, 5e-4, 0.0, True), (600, 3e-4, 10.0, True))
"""Steps, highest learning rate, weight of squares, windows: without batch norms that adapt, large steps diverge."""


def build(out: Path, device: torch.device, seed: int, share: float) -> None:
    """Make the avatar's template package, its networks and its recording in a directory.

    Args:
        out: gets `avatar/` and `hello.flac`; what is there is written over. `training/` in it keeps what was learnt, so
            that a build which was interrupted goes on from there.
        device: where to train.
        seed: of all that is random.
        share: of the usual amount of training, for a trial.

    Raises:
        InputError: `training/` is that of a build with another seed or share.
    """
    avatar, training = out / "avatar", out / "training"
    training.mkdir(parents=True, exist_ok=True)
    made_by, wanted = training / "made_by.json", {"seed": seed, "share": share}
    if made_by.is_file() and (found := json.loads(made_by.read_text())) != wanted:
        raise InputError(f"{training} holds what another build learnt, of {found}; delete it, or give another --out.")
    made_by.write_text(json.dumps(wanted))
    write_template(avatar)
    hello = speak(HELLO, HELLO_VOICE, HELLO_WORDS_PER_MINUTE, pause_seconds=0.4)
    soundfile.write(out / "hello.flac", hello.samples, hello.sample_rate, "PCM_16")
    recordings = training_recordings(max(40, int(SENTENCES * share)), seed)

    torch.manual_seed(seed)
    hearing = Hearing()
    for number, (steps, rate, clean) in enumerate(HEARING_ROUNDS, 1):
        file = training / f"hearing{number}.pth"
        if not file.exists():
            taught = train_hearing(hearing, recordings, scaled(steps, share), rate, clean, device, seed + number)
            save(taught, file)
        hearing.load_state_dict(torch.load(file, weights_only=True))
    hearing.eval()

    data = cache(lambda: portraits(open_template(avatar), hearing, recordings, seed))
    unet = untaught(hearing, seed)
    for number, (steps, rate, squares, windows) in enumerate(TALKING_ROUNDS, 1):
        file = training / f"talking{number}.pth"
        if not file.exists():
            taught = train_talking(unet, data(), scaled(steps, share), rate, squares, windows, device, seed + number)
            save(taught, file)
        unet.load_state_dict(torch.load(file, weights_only=True))

    save(hearing.encoder, avatar / "models" / "audio_encoder.pth")
    save(unet, avatar / "models" / "generator.pth")
    export_onnx(avatar / "models" / "generator.pth", avatar / "models" / "generator.onnx", overwrite=True)
    write_picture(out / "hello.jpg", hello, out)


def scaled(steps: int, share: float) -> int:
    return max(20, int(steps * share))  # a schedule of learning rates needs a few


def save(network: nn.Module, file: Path) -> None:
    with complete_or_absent(file, overwrite=True) as name:
        torch.save({key: value.cpu().contiguous() for key, value in network.state_dict().items()}, name)


def write_template(avatar: Path) -> None:
    """The template as a package: video, rectangles, landmarks and parsing masks."""
    for directory in ("landmarks", "models", "parsing"):
        (avatar / directory).mkdir(parents=True, exist_ok=True)
    rects = []
    for frame in range(FRAMES):
        file = avatar / "landmarks" / f"{frame}.lms"
        file.write_text("".join(f"{x:.1f} {y:.1f}\n" for x, y in landmarks(frame)), "ascii")
        rect = face_rect(file)
        rects.append(rect)
        write_mask(avatar / "parsing" / f"{frame}.png", rect)
    write_rectangles(avatar, rects)

    def pictures(frames: Iterable[int]) -> Iterator[Tensor]:
        for frame in frames:
            yield torch.from_numpy(draw(frame, REST)).permute(2, 0, 1)[None]

    frames = pictures(tqdm(range(FRAMES), desc="drawing the template", unit=" frames"))
    write_video(avatar, frames, fps=FPS, quality=VIDEO_QUALITY)


def write_mask(file: Path, rect: Rect) -> None:
    """A parsing mask: white, where the template's pixels stay, but for the rectangle without its margin.

    The edge of the mask that the network sees is in the margin, and a narrow network cannot quite draw over it.
    """
    x0, y0, x1, y1 = rect
    margin = round(MARGIN * (x1 - x0))
    mask = Image.new("P", (WIDTH, HEIGHT), 0)
    mask.putpalette([255, 255, 255, 0, 0, 255])
    mask.paste(1, (x0 + margin, y0 + margin, x1 - margin, y1 - margin))
    mask.save(file, optimize=True)


def landmarks(frame: int) -> np.ndarray:
    """(110,2) of a frame of the template."""
    return Head(pose(frame), REST).landmarks()


def write_picture(file: Path, speech: Speech, bundle: Path) -> None:
    """Some frames of the avatar saying something, side by side."""
    frames, _ = rendered(speech, bundle)
    chosen = [frames[round(seconds * FPS), 60:660, 420:860] for seconds in PICTURED_SECONDS]
    Image.fromarray(np.concatenate(chosen, 1)).resize((1280, 436), Image.Resampling.LANCZOS).save(file, quality=85)
