"""A template -> a template package, as digital-clone publishes them: a video, face rectangles, networks in ONNX."""

import itertools
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple, cast

import av
import av.error
import onnx
import torch
from av.video.reformatter import ColorRange
from av.video.stream import VideoStream
from torch import Tensor

from .audio_engine import load_audio_engine
from .errors import InputError, OutputError, check_choice
from .export import OUTPUTS, export_onnx
from .find import find_audio_encoder, find_network, find_template
from .halves import read_network
from .host_frames import BT709, CENTRED, host_pictures, planar_frame, yuv_frames
from .network import FRAME_RATES, AudioEncoder, Mode, UNet, load_unet
from .output import check_output_directory, complete_or_absent_directory, describe, errors_passed, is_of_source
from .progress import Progress, Silent
from .software_encoder import check_size
from .template import LANDMARKS, MASKS, RECTANGLES, VIDEO, Template, open_template
from .timings import Timings

GENERATOR, AUDIO_ENCODER = "models/generator.onnx", "models/audio_encoder.onnx"
QUALITY = 9
SEEKABLE = {"g": "50"}  # a keyframe every two seconds: frames are read backwards, too
# All frames at one quality, because all are shown: 48 dB for 59 KB a frame of the sample, where x264's usual ways at
# preset superfast take 91 KB.
LOSSY = {"preset": "medium", "tune": "psnr", "x264-params": f"mbtree=0:ipratio=1:pbratio=1:{CENTRED}"}
LOSSLESS = {"preset": "veryfast", "crf": "0"}
BLOCK = 8  # frames at a time


class Packed(NamedTuple):
    """What was packed."""

    out: Path
    template: Template
    """the one that was packed; it may have notes"""
    mode: Mode
    lossless: bool
    psnr_db: float
    """of the worst of the video's frames against the template's; infinite for equal ones"""
    networks: tuple[str, ...]
    bytes: int

    def __str__(self) -> str:
        frames = "bit for bit" if self.lossless else f"within {self.psnr_db:.1f} dB PSNR of"
        networks = f", {' and '.join(self.networks)} for {self.mode} features" if self.networks else ", no networks"
        size = f"{self.template.width}×{self.template.height}"
        parsing = ", with parsing" if self.template.parsing else ""
        return (
            f"wrote {self.out}: {len(self.template)} frames of {size}, {frames} the template's{parsing}{networks}; "
            f"{self.bytes / 1e6:.1f} MB"
        )


def pack_template(
    template: str | Path,
    out: str | Path,
    *,
    lossless: bool = False,
    model: str | Path | None = None,
    audio_encoder: str | Path | None = None,
    networks: bool = True,
    mode: Mode | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Packed:
    """Make a template package: everything that `gpurender pack` does.

    The package holds the template's frames, in their order and without those that lack landmarks, as
    `full_body_video.mp4`; their face rectangles as `cache/crop_rectangles.json`; landmarks and parsing masks, numbered
    as the frames are, where the template has them; and the networks in float32 as `models/generator.onnx` and, for
    `ave` features, `models/audio_encoder.onnx`. It is read back and compared before it appears.

    Args:
        template: a template directory, see `open_template`; or `avatar`, the bundled one.
        out: the package, a directory.
        lossless: keep the frames bit for bit, as H.264 of RGB; NVDEC and most players cannot read it. Otherwise H.264
            in 4:2:0 that all of them read, visually lossless.
        model, audio_encoder: the networks, `.pth` or `.onnx`; None looks where `find_network` and `find_audio_encoder`
            say.
        networks: whether the package gets them at all.
        mode: the kind of features of the network, see `load_unet`.
        overwrite: replace `out` if it is a package.
        progress: is told about stages and frames.

    Raises:
        InputError, OutputError: with what to do about it; nothing is left at `out` then.
    """
    progress = progress or Silent()
    path, out = find_template(template), Path(out)
    check_output_directory(out, overwrite, VIDEO, [path, model, audio_encoder])
    if mode is not None:
        check_choice("kind of features", mode, FRAME_RATES)
    if not networks and (model or audio_encoder):
        raise InputError(f"{model or audio_encoder} is to be packed, but without networks; give either.")
    person = open_template(path)
    if not lossless and (person.width % 2 or person.height % 2):
        raise InputError(
            f"{path} has frames of {person.width}×{person.height}, but H.264 in 4:2:0 has even sizes only; "
            "give --lossless."
        )
    check_size("h264", person.width, person.height)
    generator = Path(model or find_network(path)) if networks else None
    kind = network_mode(generator, mode) if generator else mode or "ave"
    if audio_encoder is not None and kind != "ave":
        raise InputError(f"{generator} takes {kind} features, which no audio encoder makes; leave out {audio_encoder}.")
    listener = Path(audio_encoder or find_audio_encoder(path)) if generator and kind == "ave" else None
    if listener:
        load_audio_engine(listener)  # which says what is wrong with it
    with complete_or_absent_directory(out, overwrite, VIDEO) as package:
        if generator:
            write_generator(generator, package, kind, progress)
        if listener:
            write_audio_encoder(listener, package, progress)
        write_rectangles(package, person.rects.tolist())
        copy_numbered(landmarks_of(person), package / LANDMARKS)
        copy_numbered(person.mask_files, package / MASKS)
        frames = errors_passed(progress.frames(blocks(person), len(person)))
        write_video(package, frames, fps=FRAME_RATES[kind], lossless=lossless)
        progress.stage("comparing the package with the template")
        psnr = worst_psnr(person, open_template(package), lossless)
        size = sum(file.stat().st_size for file in package.rglob("*") if file.is_file())
    made = tuple(Path(name).name for name, of in ((GENERATOR, generator), (AUDIO_ENCODER, listener)) if of)
    return Packed(out, person, kind, lossless, psnr, made, size)


# --- frames and what goes with them ----------------------------------------------------------------------------------


def write_rectangles(package: Path, rects: Iterable[Sequence[int]]) -> None:
    """Write the face rectangles `(x0,y0,x1,y1)` of frames 0 to N-1."""
    file = package / RECTANGLES[0]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({str(i): {"rect": list(rect)} for i, rect in enumerate(rects)}), "ascii")


def write_video(
    package: Path, batches: Iterable[Tensor], *, fps: float, lossless: bool = False, quality: int = QUALITY
) -> None:
    """Write a package's frames, from batches (B,3,H,W) uint8 RGB of even size; what was there is written over.

    H.264 in 4:2:0, BT.709 limited, at x264's rate factor `quality`; or, `lossless`, H.264 of RGB at rate factor 0 and
    of any size, which PyAV, FFmpeg and OpenCV read, NVDEC and browsers do not.

    Raises:
        OutputError: the video cannot be written.
    """
    file, rate = package / VIDEO, Fraction(fps).limit_denominator(1001)
    options = {**SEEKABLE, **(LOSSLESS if lossless else {**LOSSY, "crf": str(quality)})}
    frames = rgb_frames(batches) if lossless else yuv_frames(batches, Timings())
    try:
        with av.open(str(file.absolute()), "w", options={"movflags": "+faststart"}) as container:
            stream = cast(VideoStream, container.add_stream("libx264rgb" if lossless else "libx264", rate))
            context = stream.codec_context
            context.options = options
            context.pix_fmt = "rgb24" if lossless else "yuv420p"
            if not lossless:
                context.colorspace = context.color_primaries = context.color_trc = BT709
                context.color_range = ColorRange.MPEG
            for count, frame in enumerate(frames):
                if count == 0:
                    context.width, context.height = frame.width, frame.height
                frame.pts, frame.time_base = count, 1 / rate
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    except av.error.FFmpegError as error:
        if is_of_source(error):
            raise
        raise OutputError(describe(file, OSError(error.errno, error.strerror))) from error


def rgb_frames(batches: Iterable[Tensor]) -> Iterator[av.VideoFrame]:
    for pixels in host_pictures(batches):
        yield planar_frame(pixels).reformat(format="rgb24")


def blocks(template: Template) -> Iterator[Tensor]:
    for start in range(0, len(template), BLOCK):
        yield template.frames(range(start, min(start + BLOCK, len(template))))[0]


def landmarks_of(template: Template) -> Sequence[Path]:
    """A template's landmarks; also those that a package has beside its rectangles."""
    beside = [template.path / LANDMARKS / f"{i}.lms" for i in range(len(template))]
    return template.landmark_files or ([] if not all(file.is_file() for file in beside) else beside)


def copy_numbered(files: Sequence[Path], directory: Path) -> None:
    if files:
        directory.mkdir()
    for number, file in enumerate(files):
        shutil.copyfile(file, directory / f"{number}{file.suffix.lower()}")


def worst_psnr(template: Template, package: Template, lossless: bool) -> float:
    """Of the package's frames, read back, in decibels.

    Raises:
        OutputError: it is not what the template is.
    """
    if not torch.equal(template.rects, package.rects) or template.parsing != package.parsing:
        raise OutputError(f"the package does not read back as {template.path.name}, so nothing was left.")
    worst = float("inf")
    for ours, theirs in zip(blocks(template), blocks(package), strict=True):
        if lossless and not torch.equal(ours, theirs):
            raise OutputError(f"the video did not keep {template.path.name}'s frames bit for bit, so nothing was left.")
        errors = (ours.float() - theirs.float()).square().flatten(1).mean(1)
        worst = min(worst, 10 * math.log10(255**2 / errors.max().item()) if errors.any() else worst)
    return worst


# --- networks --------------------------------------------------------------------------------------------------------


def network_mode(network: Path, mode: Mode | None) -> Mode:
    """The kind of features that a U-Net takes; says what is wrong with it."""
    if network.suffix.lower() == ".pth":
        return load_unet(network, mode).mode
    if network.suffix.lower() == ".onnx":
        return read_network(network, mode)[1]
    raise InputError(f"{network}: a network is an .onnx export or a .pth checkpoint.")


def write_generator(network: Path, package: Path, mode: Mode, progress: Progress) -> None:
    if network.suffix.lower() == ".onnx":
        write_onnx(network, read_network(network, mode)[0], ("input", "audio"), OUTPUTS[UNet], package / GENERATOR)
    else:
        export_into(package / GENERATOR, network, mode, progress)


def write_audio_encoder(encoder: Path, package: Path, progress: Progress) -> None:
    if encoder.suffix.lower() == ".onnx":
        write_onnx(encoder, onnx.load(encoder), ("mel",), OUTPUTS[AudioEncoder], package / AUDIO_ENCODER)
    else:
        export_into(package / AUDIO_ENCODER, encoder, None, progress)


def export_into(out: Path, checkpoint: Path, mode: Mode | None, progress: Progress) -> None:
    progress.stage(f"exporting {checkpoint.name} to ONNX")
    out.parent.mkdir(exist_ok=True)
    export_onnx(checkpoint, out, mode=mode)


def write_onnx(source: Path, model: onnx.ModelProto, inputs: tuple[str, ...], output: str, out: Path) -> None:
    """Write a network as one file, its inputs, in their order, and its output under other names."""
    import onnx_ir  # slow to import, and needed here only

    graph = onnx_ir.from_proto(model)
    weights = set(graph.graph.initializers)  # old exporters list them as inputs too
    given = [value for value in graph.graph.inputs if value.name not in weights]
    ports = [*zip(given, inputs, strict=True), (graph.graph.outputs[0], output)]
    taken = {value.name for node in graph.graph.all_nodes() for value in node.outputs} | weights
    taken |= {value.name for value in graph.graph.inputs}
    for value, name in ports:
        if value.name != name and name in taken:
            raise InputError(f"{source} uses the name {name} for something else; export the checkpoint instead.")
    for value, name in ports:
        value.name = name
    written = onnx_ir.to_proto(graph)
    forget_its_origin(written)
    out.parent.mkdir(exist_ok=True)
    out.write_bytes(written.SerializeToString())


def forget_its_origin(model: onnx.ModelProto) -> None:
    """Delete what exporters write beside a network's parts: stack traces, with the directories of who exported it."""
    graph = model.graph
    parts = (graph.node, graph.input, graph.output, graph.value_info, graph.initializer)
    for part in (graph, *itertools.chain(*parts)):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
