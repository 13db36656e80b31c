"""The commands that check one implementation against another: `compare` and `reference`."""

from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option(
    "--rect",
    metavar="PART",
    help="Judge a part of the frames alone: X0,Y0,X1,Y1 in pixels, half-open; face: the face rectangles of a reference "
    "set; or a template (a directory or avatar) or a package's crop_rectangles.json: the faces as a render of it shows "
    "them.  [default: whole frames]",
)
@click.option(
    "--order",
    type=click.Choice(["bounce", "loop", "mirror"]),
    default="bounce",
    show_default=True,
    help="Where --rect is a template: the --order and --start-frame that the render was made with.",
)
@click.option("--start-frame", type=int, default=0, show_default=True, help="See --order.")
@click.option(
    "--frames",
    type=click.IntRange(1),
    metavar="N",
    help="Compare the first N frames only.  [default: all; renders of different lengths are different]",
)
@click.option(
    "--min-psnr",
    "min_psnr_db",
    type=float,
    default=40.0,
    show_default=True,
    metavar="DB",
    help="What every frame must reach; inf asks for equal frames.",
)
@click.option(
    "--min-ssim", type=float, default=0.95, show_default=True, metavar="N", help="What every frame must reach."
)
@click.option(
    "--tolerance",
    type=float,
    default=0.01,
    show_default=True,
    metavar="N",
    help="Of two reference sets: how far apart any number that goes into the network or comes out may be.",
)
@click.option(
    "--side-by-side",
    type=click.Path(path_type=Path),
    metavar="FILE.mp4",
    help="Write a video of A, B and their difference, with each frame's number and figures.",
)
@click.option(
    "--amplify", type=click.FloatRange(0), default=10, show_default=True, help="How much to brighten the difference."
)
@click.option(
    "--html",
    type=click.Path(path_type=Path),
    metavar="FILE.html",
    help="Write a page, in one file: curves over the frames, the worst frames.",
)
@click.option(
    "--json", "json_file", type=click.Path(path_type=Path), metavar="FILE.json", help="Write all figures for a program."
)
@click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda|cuda:N", help="Where to compute.")
@click.option("--overwrite", is_flag=True, help="Replace what is at --side-by-side, --html and --json.")
@click.option("--quiet", is_flag=True, help="Print errors only: the exit code tells.")
def compare(a: str, b: str, quiet: bool, **options: Any) -> None:
    """Say how alike two renders are, frame by frame.

    Figures are MSE, PSNR and SSIM.

    A and B are videos, directories of numbered pictures, patterns such as frames/%05d.png, or reference sets (see
    gpurender reference), in any mix. Frame i of A is held against frame i of B. Of a reference set, its samples are
    compared; of two sets, also the numbers behind the frames.

    \b
      gpurender compare mine.mp4 theirs.mp4
      gpurender compare mine.mp4 frames/%05d.png --rect avatar --side-by-side both.mp4 --html page.html
      gpurender compare reference/ theirs.mp4 --rect face --json figures.json

    Every frame is held to --min-psnr and --min-ssim, so that one wrong frame among thousands is found. The overall
    figures are the mean of the frames' MSE, the PSNR of that mean, and the mean of their SSIM.

    Exit codes: 0 alike, 1 different, 2 something given cannot be used (one line says what), 130 interrupted.
    """
    from .compare.run import compare_frames
    from .progress import TerminalProgress

    progress = None if quiet else TerminalProgress("comparing", "compared")
    comparison = compare_frames(a, b, progress=progress, **options)
    if not quiet:
        click.echo(str(comparison))
        for written in (options["side_by_side"], options["html"], options["json_file"]):
            if written is not None:
                click.echo(f"wrote {written}")
    if not comparison.alike:
        click.get_current_context().exit(1)


@click.command()
@click.option(
    "--template",
    required=True,
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="As in make; so are --audio, --model and --audio-encoder.",
)
@click.option("--audio", required=True, type=click.Path(path_type=Path), metavar="FILE", help="Sound or features.")
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="DIR", help="The directory to make.")
@click.option(
    "--frames",
    type=click.IntRange(1),
    default=10,
    show_default=True,
    metavar="N",
    help="Sample frames, evenly spaced from the first to the last. Each takes 4 MB and a picture.",
)
@click.option("--model", type=click.Path(path_type=Path), metavar="FILE", help="The trained network, .pth or .onnx.")
@click.option("--audio-encoder", type=click.Path(path_type=Path), metavar="FILE", help="Turns sound into features.")
@click.option("--fps", type=click.FloatRange(1, 240), help="Frames a second.  [default: as the network was trained]")
@click.option(
    "--order",
    type=click.Choice(["bounce", "loop", "mirror"]),
    default="bounce",
    show_default=True,
    help="As in make; so are --start-frame and --parsing.",
)
@click.option("--start-frame", type=int, default=0, show_default=True, help="Template frames to skip.")
@click.option("--parsing/--no-parsing", default=None, help="Use the parsing masks.  [default: if there are masks]")
@click.option(
    "--device",
    default="cpu",
    show_default=True,
    metavar="auto|cpu|cuda|cuda:N",
    help="Where to compute. The CPU gives the same bytes each time.",
)
@click.option(
    "--engine",
    type=click.Choice(["auto", "tensorrt", "openvino", "torch"]),
    default="auto",
    show_default=True,
    help="What runs the network, in float32.",
)
@click.option("--overwrite", is_flag=True, help="Replace the reference set at --out.")
@click.option("--quiet", is_flag=True, help="Print errors only.")
def reference(template: Path, audio: Path, out: Path, quiet: bool, **options: Any) -> None:
    """Write a set of frames to check others against.

    A reference set: sample frames and the numbers behind them, for checking another implementation.

    \b
      gpurender reference --template avatar --audio hello --out reference
      gpurender compare reference theirs.mp4 --rect face

    It holds frames/00012.png for output frame 12, and samples/00012.npz with what went into the network for it (input,
    audio) and what came out (output), float32; metadata.json says what they are. The format is documented in
    gpurender/reference_set.py. Nothing appears at --out until it is complete.
    """
    from .progress import TerminalProgress
    from .reference import write_reference

    progress = None if quiet else TerminalProgress("drawing", "drew")
    written = write_reference(template, audio, out, progress=progress, **options)
    if not quiet:
        width, height = written.size
        click.echo(f"wrote {out}: {len(written)} of {written.total} frames of {width}×{height}")
