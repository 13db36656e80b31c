"""Pictures that were encoded elsewhere -> a container's video track."""

import io
from fractions import Fraction
from typing import cast

import av
from av.bitstream import BitStreamFilterContext
from av.container import InputContainer, OutputContainer
from av.packet import Packet
from av.video.stream import VideoStream

from .software_encoder import Codec

TAGGED_BT709: dict[Codec, str] = {
    "h264": "h264_metadata=colour_primaries=1:transfer_characteristics=1:matrix_coefficients=1:video_full_range_flag=0"
    ":chroma_sample_loc_type=1",
    "hevc": "hevc_metadata=colour_primaries=1:transfer_characteristics=1:matrix_coefficients=1:video_full_range_flag=0"
    ":chroma_sample_loc_type=1",
    "av1": "av1_metadata=color_primaries=1:transfer_characteristics=1:matrix_coefficients=1:color_range=tv",
}
"""FFmpeg's bitstream filters that write BT.709 limited into a stream's headers: NVENC leaves it out."""


class ElementaryTrack:
    """A video track of encoded pictures: Annex-B (H.264, HEVC) or OBUs (AV1), in the order in which they are decoded.

    Pictures are shown at a constant rate. The track appears in the container with the first picture, whose headers
    tell what is in it, and says that it is BT.709 in limited range.

    Args:
        container: where it goes.
        codec, rate, size: what it is; size is (width, height) in pixels.
        delay: frames by which a picture may be decoded before it is shown: the encoder's number of B-frames, or more.
    """

    def __init__(
        self, container: OutputContainer, codec: Codec, rate: Fraction, size: tuple[int, int], delay: int
    ) -> None:
        self._container = container
        self._codec: Codec = codec
        self._rate = rate
        self._size = size
        self._delay = delay
        self._decoded = 0
        self._filter: BitStreamFilterContext | None = None
        self._stream: VideoStream | None = None

    def packets(self, data: bytes, number: int) -> list[Packet]:
        """The packets of one picture, shown as frame `number`."""
        filters = self._filter or self._begin(data)
        packet = Packet(data)
        packet.pts, packet.dts = number, self._decoded - self._delay
        packet.duration, packet.time_base = 1, 1 / self._rate
        packet.is_keyframe = begins_anew(data, self._codec)
        self._decoded += 1
        packets = filters.filter(packet)
        for filtered in packets:
            filtered.stream, filtered.time_base = cast(VideoStream, self._stream), 1 / self._rate
        return packets

    def _begin(self, first: bytes) -> BitStreamFilterContext:
        if self._codec == "hevc" and self._container.format.name != "matroska":
            self._stream = self._stream_tagged_hvc1(first)
        else:
            width, height = self._size
            stream = self._container.add_mux_stream(self._codec, rate=self._rate, width=width, height=height)
            self._stream = cast(VideoStream, stream)
        self._stream.time_base = 1 / self._rate
        self._filter = BitStreamFilterContext(TAGGED_BT709[self._codec], self._stream)
        return self._filter

    def _stream_tagged_hvc1(self, first: bytes) -> VideoStream:
        """A stream with the tag that Apple's players ask for; it promises the headers ahead of the pictures, so they
        are taken from the first, with the colour already in them."""

        def opened(data: bytes) -> InputContainer:
            return av.open(io.BytesIO(data), "r", format="hevc")

        with opened(first) as raw:
            tagged = BitStreamFilterContext(TAGGED_BT709["hevc"], raw.streams.video[0]).filter(Packet(first))
        with opened(b"".join(map(bytes, tagged))) as headers:
            stream = cast(VideoStream, self._container.add_stream_from_template(headers.streams.video[0]))
        stream.codec_context.codec_tag = "hvc1"
        return stream


def begins_anew(data: bytes, codec: Codec) -> bool:
    """Whether decoding can begin at this picture: an IDR or CRA picture, or an AV1 key frame's sequence header."""
    if codec == "av1":
        return any(kind == 1 for kind in obu_types(data))
    starts = [at + 3 for at in positions(data, b"\0\0\1") if at + 3 < len(data)]
    if codec == "h264":
        return any(data[at] & 0x1F == 5 for at in starts)
    return any(16 <= data[at] >> 1 & 0x3F <= 21 for at in starts)


def positions(data: bytes, mark: bytes) -> list[int]:
    found, at = [], data.find(mark)
    while at >= 0:
        found.append(at)
        at = data.find(mark, at + len(mark))
    return found


def obu_types(data: bytes) -> list[int]:
    """The types of an AV1 temporal unit's OBUs (AV1 specification, 5.3: header, then a leb128 size)."""
    types, at = [], 0
    while at < len(data):
        header = data[at]
        types.append(header >> 3 & 0xF)
        at += 2 if header & 4 else 1  # an extension byte
        if not header & 2:  # no size: it is the last
            break
        size = shift = 0
        while at < len(data):
            byte = data[at]
            size |= (byte & 0x7F) << shift
            shift, at = shift + 7, at + 1
            if byte < 0x80:
                break
        at += size
    return types
