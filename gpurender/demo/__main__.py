"""`python -m gpurender.demo`: make the bundled avatar anew, and measure how it speaks."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from ..cuda import resolve_device
from ..errors import DeviceError, InputError
from ..find import BUNDLED


@contextmanager
def what_it_needs() -> Iterator[None]:
    """Turns a failed import into a line that says what to install."""
    try:
        yield
    except ImportError as error:
        raise click.ClickException(
            f'{error}. This needs pip install "gpurender[demo]", and libGL and libEGL of the system '
            "(Debian: apt install libgl1 libegl1)."
        ) from None


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """The bundled avatar: its drawing, its voice and its networks."""


@main.command()
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), default=BUNDLED, help="Directory.  [default: the bundle]"
)
@click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda|cuda:N", help="Where to train.")
@click.option("--seed", default=0, show_default=True, help="Of all that is random.")
@click.option(
    "--share", type=click.FloatRange(0.001, 1), default=1.0, show_default=True, help="Of the training, for a trial."
)
def build(out: Path, device: str, seed: int, share: float) -> None:
    """Draw the template, speak the sentences, train both networks and write them.

    Takes about an hour on two processor cores that have bfloat16. What was learnt so far is kept in OUT/training: run
    it again to go on after an interruption, and delete that directory to begin anew.
    """
    with what_it_needs():
        from .build import build as build_bundle

    if share < 1 and out.resolve() == BUNDLED.resolve():
        raise click.UsageError("a trial is not to replace what is bundled: give --out with --share.")
    try:
        build_bundle(out, resolve_device(device), seed, share)
    except (DeviceError, InputError) as error:
        raise click.UsageError(str(error)) from None
    click.echo(f"wrote {out}")


@main.command()
@click.option("--bundle", type=click.Path(path_type=Path, exists=True), default=BUNDLED, help="What `build` made.")
def measure(bundle: Path) -> None:
    """Render sentences and voices that were not learnt, and say how right the mouth is: a line for each."""
    with what_it_needs():
        from .measure import measure_held_out
        from .scene import draw  # noqa: F401  # used later, missed now

    for line in measure_held_out(bundle):
        click.echo(line)


if __name__ == "__main__":
    main()
