"""The command line: parses, calls the library, prints."""

import atexit
import ctypes
import errno
import gc
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import click

from .cli_bench import bench
from .cli_compare import compare, reference
from .cli_exchange import export, features, pack

MEBIBYTE = 2**20
CLOSED_PIPE = 141  # what shells say of a program that SIGPIPE ended


class Commands(click.Group):
    """Turns errors that a user can act on into one line and exit code 2."""

    def main(self, *given: Any, **named: Any) -> Any:
        with ending_at_closed_pipes():  # errors of usage and completions print here
            return super().main(*given, **named)

    def make_context(self, *given: Any, **named: Any) -> click.Context:
        with ending_at_closed_pipes():  # --help and --version print here
            return super().make_context(*given, **named)

    def invoke(self, ctx: click.Context) -> Any:
        with interruptible(), ending_at_closed_pipes():
            return self.invoked(ctx)

    def invoked(self, ctx: click.Context) -> Any:
        from .errors import DeviceError, InputError, OutputError, first_line

        for stream in ("stdout", "stderr"):
            if getattr(sys, stream) is None:  # it was closed
                setattr(sys, stream, open(os.devnull, "w"))  # noqa: SIM115
        share_memory_arenas()
        keep_to_allowed_cores()
        try:
            check_working_directory()
            return super().invoke(ctx)
        except (InputError, DeviceError, OutputError) as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(2)
        except KeyboardInterrupt:
            click.echo("Interrupted: nothing unfinished was left at the output path.", err=True)
            ctx.exit(130)
        except (RuntimeError, MemoryError) as error:  # before a render begins, which has its own words
            from .cuda import is_out_of_memory  # torch is loaded by now

            tell_of_threads(ctx, error)
            if not is_out_of_memory(error):
                raise
            whose, advice = "this machine", ""
            if any(name in str(error).lower() for name in ("cuda", "cudnn", "cublas", "cufft")):
                whose, advice = "the GPU", "end other programs on it, or give --device cpu; or "
            click.echo(
                f"Error: {whose} has too little free memory ({first_line(error)}); "
                f"{advice}give a smaller --batch or --memory.",
                err=True,
            )
            ctx.exit(2)
        except BrokenPipeError:
            raise  # see `invoke`: messages of errors may meet it, too
        except OSError as error:
            tell_of_threads(ctx, error)
            # a directory that may not be entered, a name that is too long, a full standard output
            named = "" if error.filename is None else f"{error.filename}: "
            click.echo(f"Error: {named}{error.strerror or error}.", err=True)
            ctx.exit(2)


def check_working_directory() -> None:
    """Raise InputError if it is gone: MKL would end the program with words about a library."""
    from .errors import InputError

    try:
        os.getcwd()
    except FileNotFoundError:
        raise InputError("the working directory is gone; change to another.") from None


@contextmanager
def ending_at_closed_pipes() -> Iterator[None]:
    """As of `| head`: the end is without a word, and click's exit code 1 would say "different" of `compare`."""
    try:
        yield
    except BrokenPipeError:
        for stream in ("stdout", "stderr"):
            if getattr(sys, stream) is None:  # it was closed
                continue
            try:
                getattr(sys, stream).flush()
            except BrokenPipeError:  # what it has not taken goes nowhere: Python would complain of it at the end
                setattr(sys, stream, open(os.devnull, "w"))  # noqa: SIM115
        sys.exit(CLOSED_PIPE)


def tell_of_threads(ctx: click.Context, error: Exception) -> None:
    """End the command where the system gives it no more threads."""
    if any(words in str(error) for words in ("can't start new thread", os.strerror(errno.EAGAIN))):
        click.echo(
            "Error: the system gives this process no more threads; allow it a hundred or more "
            "(docker run --pids-limit, Kubernetes' podPidsLimit, ulimit -u).",
            err=True,
        )
        ctx.exit(2)


CLEANING_SECONDS = 5.0
heard: list[float] = []
"""When the command was interrupted, by `time.monotonic`."""


@contextmanager
def interruptible() -> Iterator[None]:
    """On Ctrl-C, and where the system asks for it, the command cleans up and ends. Once it is over, this is as it was:
    while Python ends, an interrupt would break what waits for threads."""
    numbers = [getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGALRM")]
    before = {number: signal.getsignal(number) for number in numbers if number is not None}
    ours = [number for number, handler in before.items() if handler != signal.SIG_IGN]  # as by nohup, or a script's `&`
    hook = sys.unraisablehook

    def swallowed(error: Any) -> None:
        """An interrupt that came in a destructor, after which Python goes on, is sent again."""
        if isinstance(error.exc_value, KeyboardInterrupt) and hasattr(signal, "setitimer"):
            heard.clear()
            signal.setitimer(signal.ITIMER_REAL, 0.05)
        else:
            hook(error)

    heard.clear()
    sys.unraisablehook = swallowed
    for number in ours:
        signal.signal(number, interrupted)
    try:
        yield
    finally:
        sys.unraisablehook = hook
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number in ours:
            signal.signal(number, before[number])


def interrupted(number: int, frame: FrameType | None) -> None:
    """Clean up and end. Not once more while that goes on, which it would break. And not in the midst of an import:
    libraries swallow the interrupt there, or abort; so it is sent again, until the import is over."""
    while frame is not None and hasattr(signal, "setitimer"):
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            return
        frame = frame.f_back
    now = time.monotonic()
    if not heard or now - heard[-1] > CLEANING_SECONDS:
        heard.append(now)
        raise KeyboardInterrupt


def share_memory_arenas() -> None:
    """Have glibc's malloc use one arena, not eight a core: frames freed by one thread then serve the next.

    Saves 150 MB and more of resident memory. Only before torch is imported: its threads' arenas stay. It is the
    process's setting, so it is made here, not in the library.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(-8, 1)  # M_ARENA_MAX


def keep_to_allowed_cores() -> None:
    """Have torch's OpenMP take no more threads than control groups allow this process cores (`docker run --cpus`), if
    the user has not set how many. More of them would use the allowance up by waiting for each other.

    Measured: `compare`, allowed one of two cores, took 73 and 289 seconds, then 54 and 59. Only before torch is loaded.
    """
    from .host import cores_to_run_on, usable_cores

    if (cores := usable_cores()) < cores_to_run_on():
        os.environ.setdefault("OMP_NUM_THREADS", str(cores))


@contextmanager
def uncollected() -> Iterator[None]:
    """Imports meanwhile make objects that stay: Python's garbage collector goes through them neither now nor later,
    nor does it at the program's end.

    Saves 0.8 of 4.5 seconds that two seconds of video take (measured). It is the process's setting, too.
    """
    if "torch" in sys.modules:  # in a program that goes on, and whose garbage is to be collected
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        atexit.register(gc.freeze)


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
    help="The trained network, .pth or .onnx.  [default: generator.onnx, unet.onnx, unet.pth or generator.pth in the "
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
    help="What is heard in the video; or hello.  [default: --audio, if that is sound]",
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
    type=click.Choice(["auto", "fp32", "fp16", "bf16", "mixed", "int8"]),
    default="auto",
    show_default=True,
    help="fp32 is exact. auto takes the device's fastest type that stays within 40 dB PSNR of fp32 on this template "
    "(int8: 43), if trying it pays for so many frames. On a CPU, mixed is bf16 in the largest layers, and int8 is "
    "8-bit integers in the layers that hear.",
)
@click.option("--batch", type=click.IntRange(1, 1024), help="Frames at a time.  [default: what suits the engine]")
@click.option(
    "--fps",
    type=click.FloatRange(1, 240),
    help="Frames a second; at any rate, the mouth moves with the sound.  [default: what the network was trained at, "
    "25, or 20 for wenet features]",
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
    help="Memory on the device for a template's frames that stay decoded, and for work on them that is done once.  "
    "[default: half of what is free on a GPU; on a CPU a quarter, at least 512 if as much remains, or 0 if the frames "
    "take more than 512]",
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
    help="What makes the video. auto: nvenc on a GPU that has it, else x264. x264: on the host (x265 or SVT-AV1 where "
    "--codec says so). mjpeg: large files for editing, made on the device.",
)
@click.option(
    "--codec", type=click.Choice(["h264", "hevc", "av1"]), default="h264", show_default=True, help="Of the video."
)
@click.option(
    "--quality",
    type=int,
    metavar="N",
    help="Constant quality, lower is better: 0-51 for h264 (0 by x264 is lossless, which browsers do not play) and "
    "hevc, 1-63 for av1, 2-31 for mjpeg and .jpg.  [default: visually lossless]",
)
@click.option(
    "--report",
    type=click.Path(path_type=Path),
    metavar="FILE.json",
    help="Also write what was used and what each stage cost, with the machine and versions.",
)
@click.option(
    "--trace",
    type=click.Path(path_type=Path),
    metavar="FILE.json",
    help="Also write when each stage was at work on which batch, for ui.perfetto.dev or chrome://tracing.",
)
@click.option("--overwrite", is_flag=True, help="Replace what is at --out, --report and --trace.")
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

    A video appears at --out once it is complete, and so does each numbered picture. Exit codes: 0 done, 2 something
    given cannot be used (one line says what), 130 interrupted.
    """
    with uncollected():
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
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for a program.")
def doctor(as_json: bool) -> None:
    """Say what this machine can do, and what a render uses.

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


for command in (features, pack, export, compare, reference, bench):
    main.add_command(command)


if __name__ == "__main__":
    main()
