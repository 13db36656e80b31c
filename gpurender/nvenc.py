"""NVENC: video encoded by the GPU's own encoder. Frames stay on the GPU; what crosses to the host is the video."""

from collections.abc import Iterable, Iterator
from contextlib import closing
from fractions import Fraction
from functools import lru_cache
from typing import Any

import torch
from av.container import OutputContainer
from av.packet import Packet
from torch import Tensor

from .cuda import context_kept, why_no_cuda
from .cuda_graphs import CAPTURING
from .elementary import ElementaryTrack
from .errors import DeviceError
from .host_frames import as_nv12
from .prefetch import stage
from .pynvvideocodec import HAS_NO_NVENC, explained, load_pynvvideocodec
from .software_encoder import Codec
from .timings import Timings

QUALITY: dict[Codec, int] = {"h264": 20, "hevc": 22, "av1": 24}  # where none is asked for
KEYFRAME_SECONDS = 4  # players seek to keyframes
B_FRAMES = 2
WITHOUT_NVENC = {(8, 0), (9, 0)}  # compute capabilities of A100, A30, H100 and H200


class NvencEncoder:
    """Frames to a video track by NVENC, through PyNvVideoCodec.

    Raises:
        DeviceError: this GPU has no NVENC, or not for this codec or size; the driver or package is missing or too old;
            all sessions are taken. The message says which, and what to do.
    """

    def __init__(
        self,
        container: OutputContainer,
        codec: Codec,
        quality: int | None,
        rate: Fraction,
        device: torch.device,
        size: tuple[int, int],
    ) -> None:
        self.name = f"nvenc {codec}"
        self._device = device
        width, height = (side + side % 2 for side in size)
        self._codec = load_pynvvideocodec()
        abilities = encoder_abilities(device.index or 0, codec)
        largest = abilities.get("width_max", width), abilities.get("height_max", height)
        if width > largest[0] or height > largest[1]:
            raise DeviceError(f"NVENC makes {codec} up to {largest[0]}×{largest[1]} here, not {width}×{height}.")
        b_frames = min(B_FRAMES, abilities.get("num_max_bframes", 0))
        self._stream = torch.cuda.Stream(device)  # a handle of 0 would make the encoder run on one of its own
        settings = session_settings(codec, quality, rate, b_frames)
        try:
            # What the driver does here may wait for the whole GPU.
            with CAPTURING, torch.cuda.device(device), context_kept():
                self._session = self._codec.CreateEncoder(
                    *(width, height, "NV12", False),
                    gpu_id=device.index or 0,
                    cudastream=self._stream.cuda_stream,
                    **settings,
                )
        except Exception as error:  # PyNvVCException derives from Exception alone
            raise DeviceError(explained(error)) from None
        self._track = ElementaryTrack(container, codec, rate, (width, height), delay=b_frames)

    def packets(self, batches: Iterable[Tensor], timings: Timings) -> Iterator[tuple[int, list[Packet]]]:
        """Encode frames, see `write_frames`: how many went in so far, and the packets that came out."""
        if self._device.type == "cuda":  # the first batch is ready on the caller's stream alone
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        count = 0
        with closing(stage("colour", as_nv12, batches, self._device, timings)) as surfaces:
            while True:
                with torch.cuda.stream(self._stream):  # where the surfaces are waited for
                    batch = next(surfaces, None)
                    if batch is None:
                        break
                    encoded = timings.measured("encode", lambda batch=batch, at=count: self._encode(batch, at))
                count += len(batch)
                yield count, encoded
        yield count, timings.measured("encode", self._flush)

    def _encode(self, surfaces: Tensor, number: int) -> list[Packet]:
        packets = []
        for offset, surface in enumerate(surfaces):
            picture = self._codec.NV_ENC_PIC_PARAMS()
            picture.inputTimeStamp = number + offset
            try:
                packets += self._mux(self._session.Encode(Surface(surface), picture))
            except Exception as error:
                raise DeviceError(explained(error)) from None
        return packets

    def _flush(self) -> list[Packet]:
        try:
            return self._mux(self._session.EndEncode())
        except Exception as error:
            raise DeviceError(explained(error)) from None

    def _mux(self, pictures: list[dict[str, Any]]) -> list[Packet]:
        return [
            packet
            for picture in pictures
            for packet in self._track.packets(bytes(picture["data"]), int(picture["timestamp"]))
        ]


class Surface:
    """A tensor as PyNvVideoCodec takes it: torch's own `__dlpack__` has the stream by keyword only."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def cuda(self) -> "Surface":
        return self

    def __dlpack__(self, stream: int | None = None) -> object:
        return self._tensor.__dlpack__(stream=stream)

    def __dlpack_device__(self) -> tuple[Any, int]:
        return self._tensor.__dlpack_device__()


def session_settings(codec: Codec, quality: int | None, rate: Fraction, b_frames: int) -> dict[str, Any]:
    """What `CreateEncoder` is told: constant quality, the middle preset. Unknown keys would be ignored."""
    gop = max(1, round(KEYFRAME_SECONDS * rate))
    settings: dict[str, Any] = {
        "codec": codec,
        "preset": "P4",
        "tuning_info": "high_quality",
        "rc": "vbr",
        "cq": str(QUALITY[codec] if quality is None else max(1, quality)),  # 0 would leave the choice to NVENC
        "bitrate": 0,  # no target but the quality
        "maxbitrate": 0,
        "fps": f"{rate.numerator}/{rate.denominator}",
        "gop": str(gop),
        "idrperiod": str(gop),
        "bf": str(b_frames),
    }
    if codec == "av1":
        settings["use_ivf_container"] = "0"  # bare OBUs
    return settings


def encoder_abilities(gpu: int, codec: Codec) -> dict[str, int]:
    """What a GPU's NVENC can do for a codec.

    Raises:
        DeviceError: it cannot, and why.
    """
    if not torch.cuda.is_available():  # asked first: without a GPU, PyNvVideoCodec ends the process
        raise DeviceError(f"there is no GPU for NVENC: {why_no_cuda()}")
    if torch.cuda.get_device_capability(gpu) in WITHOUT_NVENC:
        raise DeviceError(HAS_NO_NVENC)
    first, this = (torch.cuda.get_device_name(number) for number in (0, gpu))
    if first != this:
        raise DeviceError(
            f"PyNvVideoCodec asks GPU 0, {first}, what the NVENC of GPU {gpu}, {this}, can do; "
            f"set CUDA_VISIBLE_DEVICES={gpu} and give --device cuda:0."
        )
    answer = told_abilities(gpu, codec)
    if isinstance(answer, str):
        raise DeviceError(answer)
    return answer


@lru_cache
def told_abilities(gpu: int, codec: Codec) -> dict[str, int] | str:
    """The same by PyNvVideoCodec, or that there is none. Asked once: asking opens a session, and if that fails, leaves
    a CUDA context behind, some hundred megabytes of the GPU's memory."""
    try:
        with CAPTURING, context_kept():
            return dict(load_pynvvideocodec().GetEncoderCaps(gpuid=gpu, codec=codec))
    except DeviceError:
        raise
    except Exception as error:
        why = explained(error)
        if why == HAS_NO_NVENC:
            return why
        raise DeviceError(why) from None  # which may pass: sessions are taken
