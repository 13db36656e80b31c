"""Who decodes a template's frames: on a GPU, DALI the pictures and NVDEC a video; on the host, Pillow and PyAV."""

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from .dali_pictures import DaliPictures
from .errors import DeviceError, InputError
from .nvdec import open_nvdec
from .pictures import Pictures
from .video import VideoFrames

DecoderName = Literal["auto", "dali", "nvdec", "pillow", "pyav"]


class Frames(Protocol):
    """Where a template's frames come from."""

    size: tuple[int, int]

    def frames(self, indices: Sequence[int]) -> list[Tensor]:
        """(3,H,W) uint8 RGB of each: on the CPU, or on the device if the decoder is there."""
        ...


def choose_picture_decoder(
    pictures: Pictures, decoder: DecoderName, device: torch.device, notes: list[str]
) -> tuple[Frames, str]:
    """Pictures as they will be decoded, and by whom; `auto` says in the notes why a GPU does not decode them.

    Raises:
        InputError: the decoder that is asked for does not decode pictures.
        DeviceError: it cannot be used here.
    """
    if decoder not in ("auto", "dali", "pillow"):
        raise InputError(f"{decoder} decodes videos, but the template's frames are pictures: auto, dali or pillow do.")
    if decoder == "dali" or (decoder == "auto" and device.type == "cuda"):
        try:
            return DaliPictures(pictures, device, notes), "dali"
        except DeviceError as error:
            if decoder == "dali":
                raise
            tell(notes, f"pictures are decoded by Pillow on the CPU: {error}")
    return pictures, "pillow"


def choose_video_decoder(
    video: VideoFrames, decoder: DecoderName, device: torch.device, notes: list[str]
) -> tuple[Frames, str]:
    """A video as it will be decoded, and by whom; `auto` says in the notes why a GPU does not decode it.

    Raises:
        InputError: the decoder that is asked for does not decode videos.
        DeviceError: it cannot be used here, or not for this video.
    """
    if decoder not in ("auto", "nvdec", "pyav"):
        raise InputError(f"{decoder} decodes pictures, but the template's frames are a video: auto, nvdec or pyav do.")
    if decoder == "nvdec" or (decoder == "auto" and device.type == "cuda"):
        try:
            return open_nvdec(video, device), "nvdec"
        except DeviceError as error:
            if decoder == "nvdec":
                raise
            tell(notes, f"the video is decoded by PyAV on the CPU: {error}")
    return video, "pyav"


def tell(notes: list[str], note: str) -> None:
    if note not in notes:
        notes.append(note)
