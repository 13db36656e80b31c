"""The command line: parses, calls the library, prints."""

import ctypes
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import click

from .cli_compare import compare, reference

MEBIBYTE = 2**20


class Commands(click.Group):
    """Turns errors that a user can act on into one line and exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        from .errors import DeviceError, InputError, OutputError

        signal.signal(signal.SIGTERM, terminated)
        share_memory_arenas()
        os.environ.setdefault("SVT_LOG", "1")  # SVT-AV1 would write its settings to the terminal
        try:
            return super().invoke(ctx)
        except (InputError, DeviceError, OutputError) as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(2)
        except KeyboardInterrupt:
            click.echo("Interrupted: nothing was left at the output path.", err=True)
            ctx.exit(130)


def terminated(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt  # clean up as after Ctrl-C


def share_memory_arenas() -> None:
    """Have glibc's malloc use two arenas, not eight a core: frames freed by one thread then serve the next.

    Saves 100 MB and more of resident memory; it is the process's setting, so it is made here, not in the library.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(-8, 2)  # M_ARENA_MAX


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="gpurender")
def main() -> None:
    """Renders talking-head video: a template, speech and a trained network become a video with moving lips."""


@main.command()
@click.option(
    "--template",
    required=True,
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="SyncTalk_2D template: full_body_img/0.jpg …, landmarks/0.lms …, and parsing/0.png … if there. Or a package: "
    "full_body_video.mp4, cache/crop_rectangles.json. Or avatar: the bundled drawing of a person.",
)
@click.option(
    "--audio",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Speech: any sound file or a video with sound; or its features, .npy or .bin with .bin.json. Or hello: a "
    "bundled recording.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A video (.mp4, .mov, .mkv), or numbered pictures such as frames/%05d.png or .jpg.  "
    "[default: <template>_<audio>.mp4 here]",
)
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The trained network, .pth or .onnx.  [default: unet.onnx, unet.pth, generator.onnx or generator.pth in the "
    "template or its models directory; for dataset/NAME of a SyncTalk_2D tree, the checkpoint/NAME/*.pth with the "
    "highest number]",
)
@click.option(
    "--audio-encoder",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Turns sound into features, .pth or .onnx.  [default: audio_encoder.onnx, audio_encoder.pth or "
    "audio_visual_encoder.pth likewise; model/checkpoints/audio_visual_encoder.pth of a SyncTalk_2D tree]",
)
@click.option(
    "--sound",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="What is heard in the video.  [default: --audio, if that is sound]",
)
@click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda|cuda:N", help="Where to render.")
@click.option(
    "--engine",
    type=click.Choice(["auto", "tensorrt", "openvino", "torch"]),
    default="auto",
    show_default=True,
    help="What runs the network. auto: openvino on a CPU; on a GPU tensorrt if it is installed, else torch.",
)
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "fp16", "bf16", "mixed"]),
    default="auto",
    show_default=True,
    help="fp32 is exact. auto takes the device's fastest type that stays within 40 dB PSNR of fp32 on this template. "
    "mixed, on a CPU, is bf16 in the largest layers.",
)
@click.option("--batch", type=click.IntRange(1, 1024), help="Frames at a time.  [default: what suits the engine]")
@click.option(
    "--fps",
    type=click.FloatRange(1, 240),
    help="Frames a second.  [default: what the network was trained at, 25, or 20 for wenet features]",
)
@click.option(
    "--order",
    type=click.Choice(["bounce", "loop", "mirror"]),
    default="bounce",
    show_default=True,
    help="How a template shorter than the speech goes on: bounce 1 2 3 2 1 0 1, loop 0 1 2 3 0 1, "
    "mirror 0 1 2 3 3 2 1 0 0 1.",
)
@click.option("--start-frame", type=int, default=0, show_default=True, help="Template frames to skip at the beginning.")
@click.option(
    "--parsing/--no-parsing",
    default=None,
    help="Keep the template's pixels where its parsing masks say so.  [default: if there are masks]",
)
@click.option(
    "--memory",
    type=click.IntRange(0),
    metavar="MIB",
    help="Memory on the device for frames that stay decoded, and work on them.  [default: 512 on a CPU, half of what "
    "is free on a GPU]",
)
@click.option(
    "--decoder",
    type=click.Choice(["auto", "dali", "nvdec", "pillow", "pyav"]),
    default="auto",
    show_default=True,
    help="What decodes the template: dali or pillow its pictures, nvdec or pyav its video. auto: on a GPU dali and "
    "nvdec, where they work.",
)
@click.option(
    "--encoder",
    type=click.Choice(["auto", "nvenc", "x264", "mjpeg"]),
    default="auto",
    show_default=True,
    help="What makes the video. auto: nvenc on a GPU that has it, else x264 (x265, SVT-AV1) on the host. mjpeg: large "
    "files for editing, made on the device.",
)
@click.option(
    "--codec", type=click.Choice(["h264", "hevc", "av1"]), default="h264", show_default=True, help="Of the video."
)
@click.option(
    "--quality",
    type=int,
    metavar="N",
    help="Constant quality, lower is better: 0-51 for h264 and hevc, 1-63 for av1, 2-31 for mjpeg and .jpg.  [default: "
    "visually lossless]",
)
@click.option(
    "--report",
    type=click.Path(path_type=Path),
    metavar="FILE.json",
    help="Also write what was used and what each stage cost, with the machine and versions.",
)
@click.option("--overwrite", is_flag=True, help="Replace what is at --out and --report.")
@click.option("--quiet", is_flag=True, help="Print errors only.")
def make(template: Path, audio: Path, out: Path | None, memory: int | None, quiet: bool, **options: Any) -> None:
    """Render a talking video.

    \b
    With nothing of your own yet, the bundled avatar says hello; then have it speak your sound:
      gpurender make --template avatar --audio hello
      gpurender make --template avatar --audio speech.wav
    \b
    The networks are found beside a template:
      gpurender make --template dataset/anna --audio speech.wav
    \b
    With networks of your own, to a file of your choice:
      gpurender make --template anna --audio speech.mp3 --out anna.mp4 \\
          --model checkpoint/anna/195.pth --audio-encoder audio_visual_encoder.pth
    \b
    Features computed before, and the sound to go with them:
      gpurender make --template anna --audio aud_ave.npy --sound speech.wav
    \b
    Numbered pictures, exact, for an editing program:
      gpurender make --template anna --audio speech.wav --out frames/%05d.png

    Nothing appears at --out until it is complete. Exit codes: 0 done, 2 something given cannot be used (one line says
    what), 130 interrupted.
    """
    from .progress import TerminalProgress
    from .render import make as render_video

    summary = render_video(
        template,
        audio,
        out,
        memory_budget=None if memory is None else memory * MEBIBYTE,
        progress=None if quiet else TerminalProgress(),
        **options,
    )
    if not quiet:
        for note in summary.notes:
            click.echo(f"note: {note}")
        click.echo(str(summary))


@main.command()
@click.argument("sound", type=click.Path(path_type=Path), metavar="SOUND")
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), metavar="FILE", help="The file to write, .npy or .bin."
)
@click.option(
    "--template",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Use the audio encoder of this template, which is found as by make. avatar is the bundled one.",
)
@click.option(
    "--audio-encoder", type=click.Path(path_type=Path), metavar="FILE", help="Use this one, .pth or .onnx, instead."
)
@click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda|cuda:N", help="Where it runs.")
@click.option("--overwrite", is_flag=True, help="Replace what is at --out.")
@click.option("--quiet", is_flag=True, help="Print errors only.")
def features(sound: Path, out: Path, quiet: bool, **options: Any) -> None:
    """Write what the network hears in SOUND, a feature file.

    make takes such a file instead of the sound and renders the same frames; so do other implementations of SyncTalk_2D.
    Float32 of (N,512) for N frames at 25 a second, as .npy, or as .bin with {"num_frames": N, "feature_size": 512,
    "shape": [N, 512]} in a .bin.json beside it.

    \b
      gpurender features speech.wav --template dataset/anna --out speech.bin
      gpurender make --template dataset/anna --audio speech.bin --sound speech.wav

    SOUND may itself be a feature file, of any of the three modes, and is then converted; no encoder is needed:

    \b
      gpurender features speech.bin --out speech.npy

    Nothing appears at --out until it is complete.
    """
    from .features import make_features
    from .progress import TerminalProgress

    progress = None if quiet else TerminalProgress("hearing", "heard")
    written = make_features(sound, out, progress=progress, **options)
    if not quiet:
        click.echo(f"wrote {out}: {written.mode} features of {len(written)} frames, {written.shape}")


@main.command()
@click.argument("template", type=click.Path(path_type=Path), metavar="DIR")
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), metavar="PACKAGE", help="The directory to write."
)
@click.option(
    "--lossless",
    is_flag=True,
    help="Keep frames bit for bit: H.264 of RGB (libx264rgb, crf 0), which FFmpeg's libraries read, but NVDEC and most "
    "players do not.  [default: visually lossless H.264 in 4:2:0, for all of them]",
)
@click.option("--model", type=click.Path(path_type=Path), metavar="FILE", help="The network, found as by make.")
@click.option("--audio-encoder", type=click.Path(path_type=Path), metavar="FILE", help="Found as by make, too.")
@click.option("--networks/--no-networks", default=True, show_default=True, help="Whether the package has them.")
@click.option(
    "--mode",
    type=click.Choice(["ave", "hubert", "wenet"]),
    help="The features that the network was trained on.  [default: what the weights tell, ave if they do not]",
)
@click.option("--overwrite", is_flag=True, help="Replace the package at --out.")
@click.option("--quiet", is_flag=True, help="Print errors only.")
def pack(template: Path, out: Path, quiet: bool, **options: Any) -> None:
    """Make a template package from a SyncTalk_2D template.

    A package is one video instead of a directory of pictures: full_body_video.mp4 with the frames that have landmarks,
    cache/crop_rectangles.json with the face rectangle of each, models/generator.onnx and models/audio_encoder.onnx;
    landmarks and parsing masks, if the template has them, numbered as the frames are. make takes it as a template, and
    so do other implementations.

    \b
      gpurender pack dataset/anna --out anna_package
      gpurender make --template anna_package --audio speech.wav

    The package is read back and held against the template, frame by frame, before it appears at --out.
    """
    from .pack import pack_template
    from .progress import TerminalProgress

    packed = pack_template(template, out, progress=None if quiet else TerminalProgress("packing", "packed"), **options)
    if not quiet:
        for note in packed.template.notes:
            click.echo(f"note: {note}")
        click.echo(str(packed))


@main.command()
@click.option("--json", "as_json", is_flag=True, help="For a program.")
def doctor(as_json: bool) -> None:
    """Say what this machine can do, and which path a render will take here.

    Each path is tried for a moment, not only looked up: decoding, the network on each engine, encoding with each
    encoder. Where something does not work, the line says what to do about it.

    \b
      gpurender doctor
      gpurender doctor --json > machine.json
    """
    import json

    from .doctor import examine
    from .progress import TerminalProgress

    examination = examine(TerminalProgress().stage)
    click.echo(json.dumps(examination.as_dict(), indent=2, ensure_ascii=False) if as_json else str(examination))


@main.command()
@click.argument("checkpoint", type=click.Path(path_type=Path), metavar="CKPT")
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="What to write: FILE.onnx, or FILE.mlpackage for Core ML.",
)
@click.option(
    "--mode",
    type=click.Choice(["ave", "hubert", "wenet"]),
    help="The features it was trained on. Weights tell wenet; ave and hubert look alike.  [default: ave]",
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16"]),
    help="Of weights, inputs and outputs.  [default: fp32 for ONNX; Core ML has fp16 only]",
)
@click.option(
    "--max-batch", type=click.IntRange(1, 1024), help="The batch may be 1 to this.  [default: 64; Core ML has 1 only]"
)
@click.option("--overwrite", is_flag=True, help="Replace what is at --out.")
def export(checkpoint: Path, out: Path, mode: Any, precision: Any, max_batch: int | None, overwrite: bool) -> None:
    """Export a checkpoint (.pth), of a U-Net or an audio encoder, to ONNX or Core ML.

    ONNX has a dynamic batch. What ONNX Runtime makes of the export is held against the checkpoint before anything is
    written. Inputs and outputs are named as in template packages: a U-Net's input, audio and output; an audio
    encoder's mel and emb.

    \b
      gpurender export checkpoint/anna/195.pth --out generator.onnx
      gpurender export checkpoint/anna/195.pth --out anna16.onnx --precision fp16 --max-batch 32
      gpurender export audio_visual_encoder.pth --out audio_encoder.onnx

    A Core ML package is for macOS 13, iOS 16 and later, with the same names, a batch of one, all float16. It needs
    pip install "gpurender[coreml]", on Linux or macOS.

    \b
      gpurender export checkpoint/anna/195.pth --out Generator.mlpackage
      gpurender export audio_visual_encoder.pth --out AudioEncoder.mlpackage

    Its operations are computed by torch, from the written files, and held against the checkpoint. That Apple's
    runtimes compute the same is unproven: no package has run on an Apple device yet.
    """
    from .progress import TerminalProgress

    progress = TerminalProgress()
    if out.suffix == ".mlpackage":
        from .coreml import export_coreml

        precision, max_batch = precision or "fp16", max_batch or 1
        progress.stage(f"exporting {checkpoint.name} to Core ML")
        check = export_coreml(checkpoint, out, mode=mode, precision=precision, max_batch=max_batch, overwrite=overwrite)
        click.echo(f"wrote {out}: a Core ML program for macOS 13 and iOS 16, fp16, batch 1")
        click.echo(f"checked operation by operation with torch, not on an Apple device: {check}")
        return
    from .export import export_onnx

    precision, max_batch = precision or "fp32", max_batch or 64
    progress.stage(f"exporting {checkpoint.name} to ONNX")
    check = export_onnx(checkpoint, out, mode=mode, precision=precision, max_batch=max_batch, overwrite=overwrite)
    click.echo(f"wrote {out}: {precision}, batch 1 to {max_batch}")
    click.echo(f"checked with ONNX Runtime: {check}")


@main.command()
@click.option(
    "--template",
    default="avatar",
    metavar="DIR",
    help="See make.  [default: avatar, as it is and enlarged to 1920×1080]",
)
@click.option("--audio", default="hello", show_default=True, metavar="FILE", help="Any sound, repeated as need be.")
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The network, .pth or .onnx.  [default: the full-width network with seeded weights]",
)
@click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda|cuda:N", help="Where to render.")
@click.option(
    "--engine", type=click.Choice(["auto", "tensorrt", "openvino", "torch"]), default="auto", show_default=True
)
@click.option("--precision", type=click.Choice(["auto", "fp32", "fp16", "bf16"]), default="auto", show_default=True)
@click.option("--encoder", type=click.Choice(["auto", "nvenc", "x264", "mjpeg"]), default="auto", show_default=True)
@click.option("--batch", type=click.IntRange(1, 1024), help="Frames at a time.  [default: what suits the engine]")
@click.option("--seconds", type=float, default=5.0, show_default=True, help="Of video in each measured render.")
@click.option("--repeats", type=int, default=3, show_default=True, help="Of each figure.")
@click.option(
    "--json", "json_file", type=click.Path(path_type=Path), metavar="FILE", help="Also write all figures, every run."
)
@click.option(
    "--html",
    "html_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Also write a page with plots: stages, batch sizes, how near the machine's limit each stage comes.",
)
@click.option(
    "--compare", type=click.Path(path_type=Path), metavar="OLD.json", help="Also show ratios to an earlier --json."
)
@click.option("--overwrite", is_flag=True, help="Replace what is at --json and --html.")
def bench(
    json_file: Path | None, html_file: Path | None, compare: Path | None, overwrite: bool, **options: Any
) -> None:
    """Measure what a render costs on this machine.

    Each stage alone, whole renders as programs of their own (wall clock, sound included), cold and warm start, memory,
    what goes between host and GPU, batch sizes, and what the machine could do at best. Medians, and the smallest and
    the largest of all runs. Takes about five minutes on two cores; other work on the machine shows in the figures.
    In a short video most template frames are shown for the first time, which costs more: --seconds 30 shows the rest.

    \b
      gpurender bench
      gpurender bench --json today.json --html today.html
      gpurender bench --compare yesterday.json
      gpurender bench --template dataset/anna --model 195.pth --audio speech.wav

    --compare calls a figure better or worse only where all runs now are on one side of all runs then; else the
    difference is within noise. Exit codes: 0 done, 2 something given cannot be used, 130 interrupted.
    """
    from .bench.measured import as_json, compared, read_record
    from .bench.page import page
    from .bench.run import bench as measure
    from .bench.table import comparison_table, table
    from .output import check_output, write_text
    from .progress import TerminalProgress

    old = None if compare is None else read_record(compare)
    for file in filter(None, (json_file, html_file)):
        check_output(file, overwrite)
    made = measure(command=sys.argv, notify=TerminalProgress().stage, **options)
    click.echo(table(made))
    pairs = [] if old is None else compared(old, made)
    if old is not None:
        click.echo("\n" + comparison_table(pairs, old, made))
    if json_file is not None:
        write_text(json_file, as_json(made), overwrite)
    if html_file is not None:
        write_text(html_file, page(made, pairs), overwrite)


main.add_command(compare)
main.add_command(reference)


if __name__ == "__main__":
    main()
