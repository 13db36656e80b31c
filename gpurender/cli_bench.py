"""The command that measures: `bench`."""

import sys
from pathlib import Path
from typing import Any

import click


@click.command()
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
    "--engine",
    type=click.Choice(["auto", "tensorrt", "openvino", "torch"]),
    default="auto",
    show_default=True,
    help="As in make; so are --precision and --encoder.",
)
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "fp16", "bf16", "mixed", "int8"]),
    default="auto",
    show_default=True,
)
@click.option("--encoder", type=click.Choice(["auto", "nvenc", "x264", "mjpeg"]), default="auto", show_default=True)
@click.option("--batch", type=click.IntRange(1, 1024), help="Frames at a time.  [default: what suits the engine]")
@click.option("--seconds", type=float, help="Of video in each measured render.  [default: 5, on a GPU 60]")
@click.option("--repeats", type=int, default=3, show_default=True, help="How often each figure is measured.")
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
    the largest of all runs. Takes about four minutes on two cores; other work on the machine shows in the figures.
    In a short video most template frames are shown for the first time, which costs more: --seconds 30 shows the rest.

    \b
      gpurender bench
      gpurender bench --json today.json --html today.html
      gpurender bench --compare yesterday.json
      gpurender bench --template dataset/anna --model 195.pth --audio speech.wav

    --compare calls a figure better or worse only where all runs now are on one side of all runs then, by more than half
    of either's spread, or three spreads where there are two runs only; else the difference is within noise. Exit codes:
    0 done, 2 something given cannot be used, 130 interrupted.
    """
    from .bench.measured import as_json, read_record
    from .bench.page import page
    from .bench.run import bench as measure
    from .bench.table import comparison_table, table
    from .errors import InputError
    from .output import check_outputs, write_text
    from .progress import TerminalProgress

    old = None if compare is None else read_record(compare)
    if old is not None and old["suite"] != "bench":
        raise InputError(f"{compare} is no record of gpurender bench; give what its --json wrote.")
    check_outputs([json_file, html_file], overwrite, [compare, options["model"], options["audio"]])
    made = measure(command=["gpurender", *sys.argv[1:]], notify=TerminalProgress().stage, **options)
    if json_file is not None:
        write_text(json_file, as_json(made), overwrite)
    if html_file is not None:
        write_text(html_file, page(made, old), overwrite)
    click.echo(table(made))  # behind the files: who reads it may close the pipe
    if old is not None:
        click.echo("\n" + comparison_table(old, made))
