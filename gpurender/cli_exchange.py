"""The commands that carry data to and from other implementations: `features`, `pack` and `export`."""

from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument("sound", type=click.Path(path_type=Path), metavar="SOUND")
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), metavar="FILE", help="The file to write, .npy or .bin."
)
@click.option(
    "--template",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Use the audio encoder of this template, found as make finds it. avatar is the bundled one.",
)
@click.option(
    "--audio-encoder", type=click.Path(path_type=Path), metavar="FILE", help="Use this one, .pth or .onnx, instead."
)
@click.option(
    "--device",
    default="auto",
    show_default=True,
    metavar="auto|cpu|cuda|cuda:N",
    help="Where the audio encoder runs.",
)
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
        for note in written.notes:
            click.echo(f"note: {note}")
        click.echo(f"wrote {out}: {written.mode} features of {len(written)} frames, {written.shape}")


@click.command()
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
@click.option(
    "--model", type=click.Path(path_type=Path), metavar="FILE", help="The network.  [default: found as by make]"
)
@click.option(
    "--audio-encoder", type=click.Path(path_type=Path), metavar="FILE", help="Likewise.  [default: found as by make]"
)
@click.option("--networks/--no-networks", default=True, show_default=True, help="Put them into the package.")
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


@click.command()
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
    "--max-batch",
    type=click.IntRange(1, 1024),
    help="1: a file for one frame at a time; more: for batches of any size.  [default: 64; Core ML has 1 only]",
)
@click.option("--overwrite", is_flag=True, help="Replace what is at --out.")
def export(checkpoint: Path, out: Path, mode: Any, precision: Any, max_batch: int | None, overwrite: bool) -> None:
    """Export a checkpoint to ONNX or Core ML.

    CKPT is a .pth of a U-Net or of an audio encoder.

    ONNX has a dynamic batch. What ONNX Runtime makes of the export is held against the checkpoint before anything is
    written. Inputs and outputs are named as in template packages: a U-Net's input, audio and output; an audio
    encoder's mel and emb.

    \b
      gpurender export checkpoint/anna/195.pth --out generator.onnx
      gpurender export checkpoint/anna/195.pth --out anna16.onnx --precision fp16
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
        from .errors import InputError

        if precision not in (None, "fp16") or max_batch not in (None, 1):
            raise InputError("Core ML is fp16 with a batch of 1; leave out --precision and --max-batch.")
        progress.stage(f"exporting {checkpoint.name} to Core ML")
        check = export_coreml(checkpoint, out, mode=mode, overwrite=overwrite)
        click.echo(f"wrote {out}: a Core ML program for macOS 13 and iOS 16, fp16, batch 1")
        click.echo(f"checked operation by operation with torch, not on an Apple device: {check}")
        return
    from .export import export_onnx

    precision, max_batch = precision or "fp32", max_batch or 64
    progress.stage(f"exporting {checkpoint.name} to ONNX")
    check = export_onnx(checkpoint, out, mode=mode, precision=precision, max_batch=max_batch, overwrite=overwrite)
    click.echo(f"wrote {out}: {precision}, {'one frame at a time' if max_batch == 1 else 'batches of any size'}")
    click.echo(f"checked with ONNX Runtime: {check}")
