"""The frames of a template's video by NVDEC, the GPU's own decoder; how many there are, `VideoFrames` says."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from threading import Lock
from typing import Any, Protocol

import torch
from torch import Tensor

from .color import BETWEEN, Matrix, nv12_to_rgb
from .cuda import is_out_of_memory
from .errors import DeviceError, InputError
from .pynvvideocodec import explained, load_pynvvideocodec, reason
from .streams import hand_over
from .video import AS_OPENCV, VideoFrames

MATRICES: dict[int, Matrix] = {1: "bt709", 9: "bt2020"}  # by H.273's numbers
AT_ONCE = 8
"""Frames that are asked of the decoder together; it holds so many surfaces."""

STRETCH_BYTES = 256 * 2**20
"""Surfaces that are kept while a video goes backwards; each step would else decode from the keyframe before."""

TOLERANCE = 1.0
"""Levels on average from PyAV's frame. H.264 and its successors decode to the same bits everywhere, MPEG-4 nearly."""

FINE = 8
"""With so many ticks of the time base between frames or more, gaps that differ by one tick differ by rounding alone."""


class Decoder(Protocol):
    """What is used of PyNvVideoCodec's `SimpleDecoder`."""

    def __len__(self) -> int: ...

    def get_batch_frames_by_index(self, indices: list[int]) -> list[Any]:
        """Surfaces (H*3/2,W) uint8 NV12 that export DLPack and are valid until the next call; indices rise."""
        ...


class NvdecFrames:
    """A video's frames, decoded on the GPU. Callers keep the frames that they use again. Here only those are kept
    that come next while a video goes backwards, in `STRETCH_BYTES` of the device's memory.

    NVDEC is used only where its frames are PyAV's. How many there are, their size, colours and rotation come from
    `video`; on opening, frames after three keyframes are compared with `video`'s and with their neighbours.

    Attributes:
        size: (width, height) in pixels, as shown.
    """

    def __init__(
        self, video: VideoFrames, decoder: Decoder, device: torch.device, stream: torch.cuda.Stream | None = None
    ) -> None:
        """
        Args:
            video: of the same file.
            decoder, device, stream: what decodes, where its surfaces are, and the stream on which it does; None on a
                CPU.

        Raises:
            DeviceError: the decoder's frames are not `video`'s; the message says how they differ.
            InputError: `video` cannot decode a frame that is compared.
        """
        self.size = video.size
        self._video = video
        self._decoder = decoder
        self._device = device
        self._stream = stream
        self._lock = Lock()
        self._stretch: dict[int, Tensor] = {}  # surfaces by number
        self._end = 0  # of what was asked for last
        if len(decoder) != len(video):
            raise DeviceError(f"NVDEC counts {len(decoder)} frames in {video.file.name}, but it shows {len(video)}.")
        try:
            self._to_rgb = self._find_conversion()
            self._hold_against_video()
        except (DeviceError, InputError):
            raise
        except Exception as error:  # PyNvVideoCodec's derive from Exception alone
            if is_out_of_memory(error):
                raise
            raise DeviceError(f"NVDEC cannot decode {video.file.name} ({reason(error)}).") from None

    def __len__(self) -> int:
        return len(self._video)

    def frames(self, indices: Sequence[int]) -> list[Tensor]:
        """(3,H,W) uint8 RGB on the device, of each; ready on torch's current stream. Any thread may call.

        Raises:
            InputError: NVDEC fails at a frame.
        """
        try:
            with self._lock:
                return self._to_frames(self._from_stretch(sorted(set(indices))), self._to_rgb, indices)
        except Exception as error:  # PyNvVideoCodec's derive from Exception alone
            if is_out_of_memory(error):
                raise
            if "OUT_OF_MEMORY" in str(error):  # of the driver, as PyNvVideoCodec tells it
                raise torch.OutOfMemoryError(reason(error)) from None
            raise InputError(
                f"{self._video.file}: NVDEC cannot decode some of the frames {min(indices)} to {max(indices)} "
                f"({reason(error)}); with --decoder pyav the CPU decodes."
            ) from None

    def _from_stretch(self, wanted: list[int]) -> dict[int, Tensor]:
        """Surfaces (H*3/2,W) by number; going backwards, from a stretch that is decoded in one go and kept."""
        surfaces = {i: self._stretch[i] for i in wanted if i in self._stretch}
        missing = [i for i in wanted if i not in surfaces]
        if missing:
            end = missing[-1] + 1
            backwards, self._end = end < self._end, end
            self._stretch = {}
            if backwards:
                width, height = self.size
                first = max(end - STRETCH_BYTES // (width * height * 3 // 2), 0)
                self._stretch = self._decode(sorted({*missing, *range(first, end)}))
                surfaces |= {i: self._stretch[i] for i in missing}
            else:
                surfaces |= self._decode(missing)
        return surfaces

    def _decode(self, wanted: list[int]) -> dict[int, Tensor]:
        """Copies of surfaces (H*3/2,W) by number, which rises."""
        surfaces: dict[int, Tensor] = {}
        with torch.cuda.stream(self._stream):
            for start in range(0, len(wanted), AT_ONCE):
                some = wanted[start : start + AT_ONCE]
                given = self._decoder.get_batch_frames_by_index(some)
                # Copied, because the decoder's next call writes over its surfaces.
                surfaces |= {i: torch.from_dlpack(s).clone() for i, s in zip(some, given, strict=True)}
        return surfaces

    def _to_frames(
        self, surfaces: dict[int, Tensor], to_rgb: Callable[[Tensor], Tensor], indices: Sequence[int]
    ) -> list[Tensor]:
        numbers = list(surfaces)
        pixels: dict[int, Tensor] = {}
        with torch.cuda.stream(self._stream):
            for start in range(0, len(numbers), AT_ONCE):
                some = numbers[start : start + AT_ONCE]
                frames = to_rgb(torch.stack([surfaces[i] for i in some]))
                pixels |= {i: self._video.turned(frame) for i, frame in zip(some, frames, strict=True)}
        hand_over(pixels.values(), self._stream)
        return [pixels[i] for i in indices]

    def _find_conversion(self) -> Callable[[Tensor], Tensor]:
        """The conversion to RGB that `video` uses. PyAV does not tell how chroma is sited that is interpolated: the
        siting is taken whose first frame is nearest to `video`'s."""
        if self._video.colorspace in AS_OPENCV:
            return partial(as_opencv, full_range=self._video.full_range)
        matrix, full_range = MATRICES[self._video.colorspace], self._video.full_range
        ways = [partial(nv12_to_rgb, matrix=matrix, full_range=full_range, siting=siting) for siting in BETWEEN]
        first, (shown,) = self._decode([0]), self._video.frames([0])
        return min(ways, key=lambda way: difference(self._to_frames(first, way, [0])[0], shown))

    def _hold_against_video(self) -> None:
        """Check frames beside three keyframes, the last first: the decoder has to find each of them."""
        last, name = len(self) - 1, self._video.file.name
        keys = [bisect_left(self._video.times, key) for key in self._video.keys]
        for number in sorted({0, min(keys[len(keys) // 2] + 1, last), min(keys[-1] + 1, last)}, reverse=True):
            (ours,) = self._to_frames(self._decode([number]), self._to_rgb, [number])
            near = [i for i in (number - 1, number, number + 1) if 0 <= i <= last]
            off = {i: difference(ours, frame) for i, frame in zip(near, self._video.frames(near), strict=True)}
            nearest = min(near, key=lambda i: (off[i], i != number))
            if nearest != number:
                raise DeviceError(f"NVDEC gives frame {nearest} of {name} where frame {number} is asked for.")
            if off[number] > TOLERANCE:
                raise DeviceError(f"NVDEC's frame {number} of {name} is {off[number]:.1f} levels from PyAV's.")


def open_nvdec(video: VideoFrames, device: torch.device) -> NvdecFrames:
    """A video's frames by NVDEC on a CUDA device.

    Raises:
        DeviceError: NVDEC is not here, or is not fit for this video; the message says why and what to do.
    """
    if device.type != "cuda":
        raise DeviceError(f"NVDEC decodes on a CUDA GPU, but the device is {device}.")
    find_nvdec()
    check_fit(video)
    stream = torch.cuda.Stream(device)
    return NvdecFrames(video, open_decoder(video, stream.device.index, stream.cuda_stream), stream.device, stream)


def find_nvdec() -> str:
    """PyNvVideoCodec's version, if it and a GPU are here.

    Raises:
        DeviceError: they are not; the message says why and what to do.
    """
    if not torch.cuda.is_available():  # asked first: without a GPU, PyNvVideoCodec's decoder ends the process
        raise DeviceError("there is no CUDA GPU for NVDEC.")
    return load_pynvvideocodec().__version__


def check_fit(video: VideoFrames) -> None:
    """
    Raises:
        DeviceError: the video is not of the kind whose frames NVDEC is trusted to find and decode alike.
    """
    width, height = video.size
    gaps = [after - before for before, after in pairwise(video.times)]
    name = video.file.name
    if video.pixel_format not in ("yuv420p", "yuvj420p"):
        raise DeviceError(f"NVDEC is used for 8-bit 4:2:0, but {name} is {video.pixel_format}.")
    if width % 2 or height % 2:
        raise DeviceError(f"NVDEC is used for even sizes, but {name} is {width}×{height}.")
    if video.colorspace not in AS_OPENCV and video.colorspace not in MATRICES:
        raise DeviceError(
            f"NVDEC is used for BT.601, BT.709 and BT.2020, but {name} has matrix {video.colorspace} of H.273."
        )
    if gaps and max(gaps) - min(gaps) > (1 if min(gaps) >= FINE else 0):
        raise DeviceError(f"NVDEC is used for evenly spaced frames, but those of {name} are not.")
    if not video.stand_alone:
        raise DeviceError(
            f"NVDEC is used where keyframes stand alone, but {name} has frames that need what is before one (open GOP)."
        )


def open_decoder(video: VideoFrames, gpu: int, stream: int) -> Decoder:
    """PyNvVideoCodec's decoder of a file, on a GPU that is there, on a CUDA stream given by its handle.

    Raises:
        DeviceError: it does not decode this file here.
    """
    codec = load_pynvvideocodec()
    try:
        return codec.SimpleDecoder(
            str(video.file.absolute()),
            gpu_id=gpu,
            cuda_stream=stream,
            use_device_memory=True,
            output_color_type=codec.OutputColorType.NATIVE,
        )
    except Exception as error:  # PyNvVideoCodec's derive from Exception alone
        if "libnvcuvid" in str(error):
            raise DeviceError(explained(error)) from None
        raise DeviceError(f"NVDEC cannot decode {video.file.name} ({reason(error)}).") from None


def as_opencv(surfaces: Tensor, full_range: bool) -> Tensor:
    """The pixels of OpenCV's `VideoCapture` for BT.601 and for frames without a tag: see `video.to_rgb`.

    FFmpeg's fast conversion on x86: fixed point that is cut off at each product, the nearest chroma sample. The same
    bits, in any range and size; up to 4 levels from exact.

    Args:
        surfaces: (B,H*3/2,W) uint8 NV12, H and W even.

    Returns:
        (B,3,H,W) uint8 RGB on the device of `surfaces`.
    """
    height = surfaces.shape[1] * 2 // 3
    eight = surfaces.int() * 8
    luma, chroma = eight[:, :height], eight[:, height:].unflatten(2, (-1, 2)) - 128 * 8
    # in 1/8192: Y, then Cr's share of red, Cb's and Cr's of green, Cb's of blue
    y, rv, gu, gv, bu = (8192, 11485, -2819, -5850, 14516) if full_range else (9539, 13075, -3209, -6660, 16525)
    grey = (luma - (0 if full_range else 16 * 8)) * y >> 16
    cb, cr = chroma.unbind(3)
    shares = torch.stack([cr * rv >> 16, (cb * gu >> 16) + (cr * gv >> 16), cb * bu >> 16], 1)
    shares = shares.repeat_interleave(2, 2).repeat_interleave(2, 3)
    return shares.add_(grey.unsqueeze(1)).clamp_(0, 255).to(torch.uint8)


def difference(frame: Tensor, other: Tensor) -> float:
    """Levels on average; waits for the device."""
    return (frame.float() - other.to(frame.device).float()).abs().mean().item()
