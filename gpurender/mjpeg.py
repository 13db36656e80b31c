"""MJPEG: video as JPEG pictures, compressed where the frames are. Large, and not for browsers; for editing."""

from collections.abc import Iterable, Iterator
from fractions import Fraction

import torch
from av.container import OutputContainer
from av.packet import Packet
from torch import Tensor

from .cuda_graphs import wait_for_all
from .errors import DeviceError
from .numbered import JPEG_QUALITY
from .prefetch import stage
from .timings import Timings


class MjpegEncoder:
    """Frames to a video track of JPEG pictures by torchvision: nvJPEG on a GPU, libjpeg on a CPU.

    Raises:
        DeviceError: torchvision is not installed.
    """

    name = "mjpeg"

    def __init__(
        self,
        container: OutputContainer,
        quality: int | None,
        rate: Fraction,
        device: torch.device,
        size: tuple[int, int],
    ) -> None:
        try:
            from torchvision.io import encode_jpeg
        except ImportError:
            raise DeviceError(
                "the mjpeg encoder needs torchvision, which is not installed; pip install torchvision."
            ) from None
        self._encode_jpeg = encode_jpeg
        self._quality = jpeg_quality(JPEG_QUALITY if quality is None else quality)
        self._rate = rate
        self._device = device
        width, height = size
        self._stream = container.add_mux_stream("mjpeg", rate=rate, width=width, height=height, time_base=1 / rate)

    def packets(self, batches: Iterable[Tensor], timings: Timings) -> Iterator[tuple[int, list[Packet]]]:
        """Compress frames (B,3,H,W) uint8 RGB: how many went in so far, and the packets that came out."""

        def compress(frames: Tensor) -> list[Tensor]:
            # torchvision's encoder keeps to the stream of its first call in the process, whatever the current one is.
            if frames.is_cuda:
                torch.cuda.current_stream(frames.device).synchronize()
            pictures = self._encode_jpeg(list(frames), quality=self._quality)
            if frames.is_cuda:
                wait_for_all(frames.device)
            return [picture.cpu() for picture in pictures]  # files, not pixels

        count = 0
        for files in stage("encode", compress, batches, self._device, timings):
            packets = []
            for file in files:
                packet = Packet(file.numpy().tobytes())
                packet.pts = packet.dts = count
                packet.duration, packet.time_base = 1, 1 / self._rate
                packet.is_keyframe, packet.stream = True, self._stream
                packets.append(packet)
                count += 1
            yield count, packets


def jpeg_quality(quality: int) -> int:
    """libjpeg's quality, 1 to 100, for 31 to 2 of FFmpeg's scale."""
    return 100 - round((quality - 1) * 99 / 30)
