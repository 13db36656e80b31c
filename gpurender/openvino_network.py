"""An ONNX network made ready for OpenVINO on a processor, once: its halves are kept in the user's cache."""

import ctypes
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from onnx import ModelProto

from .cache import cache_directory, hash_of_network, is_whole, seal
from .errors import InputError, OutputError
from .half import to_float32
from .halves import cut, read_network
from .network import WINDOW_SHAPES, Mode
from .openvino_graph import channels_last, fold, tile
from .output import complete_or_absent_directory
from .private_openvino import openvino, preprocess

SUMS, HALVES = "SHA256SUMS", "*coder.*"
UNFINISHED = f".{'[0-9a-f]' * 32}-*"
"""What `complete_or_absent_directory` hides here meanwhile, and a killed program leaves."""
HOUR = 3600.0
KEPT_VERSION = 5  # part of the cache key: raise it when what is made here, or in what it calls, changes


@dataclass(frozen=True)
class OnnxNetwork:
    """A network's halves for OpenVINO: float32 outside and a batch of one whatever they had, and eased for a processor.

    Attributes:
        mode, encoder, decoder, again: see `Halves`.
    """

    mode: Mode
    encoder: openvino.Model | None
    decoder: openvino.Model
    again: bool


def cached_network(path: Path, mode: Mode | None, notify: Callable[[str], None] = lambda text: None) -> OnnxNetwork:
    """The network as `make_ready` makes it: from the user's cache if it is there, else it is put there.

    Making it takes most of a second, much of it to load libraries that rewrite networks.

    Raises:
        InputError: see `read_network`.
    """
    directory = kept_directory(path, mode)
    if directory is not None:
        with suppress(RuntimeError, OSError):
            if is_whole(directory / SUMS, directory.glob(HALVES)):
                return read_kept(directory)
    notify("making the network ready for this processor")
    network = make_ready(path, mode)
    if directory is not None and directory == kept_directory(path, mode):  # else it was replaced while it was read
        with suppress(OutputError, RuntimeError, OSError):  # it can be made anew
            keep(network, directory)
            network = read_kept(directory)  # whose weights are the file's pages
            return_free_memory()
    return network


def kept_directory(path: Path, mode: Mode | None) -> Path | None:
    """Where the halves of a file are kept; None if nowhere."""
    version = openvino.__version__.split("-")[0]
    try:
        return cache_directory() / f"{hash_of_network(path)[:32]}-{mode or 'any'}-v{KEPT_VERSION}-openvino{version}"
    except (OSError, OutputError, ValueError):  # a file that cannot be read, no cache, an empty file
        return None


def read_kept(directory: Path) -> OnnxNetwork:
    """Raises RuntimeError where OpenVINO cannot read it, OSError where another program has just replaced it."""
    core = openvino.Core()
    decoder = core.read_model(directory / "decoder.xml")
    has_encoder = "encoder.xml" in (directory / SUMS).read_text("utf-8")
    encoder = core.read_model(directory / "encoder.xml") if has_encoder else None
    window = tuple(decoder.inputs[-1].shape)[1:]
    modes: list[Mode] = [mode for mode, shape in WINDOW_SHAPES.items() if shape == window]
    kept = len(encoder.outputs) if encoder else 0
    return OnnxNetwork(modes[0], encoder, decoder, again=len(decoder.inputs) > kept + 1)


def keep(network: OnnxNetwork, directory: Path) -> None:
    if is_whole(directory / SUMS, directory.glob(HALVES)):  # another program has just made it, and others read it
        return
    shutil.rmtree(directory, ignore_errors=True)  # it was damaged
    for hidden in directory.parent.glob(UNFINISHED):
        with suppress(FileNotFoundError):  # it was finished just now
            if time.time() - hidden.stat().st_mtime > HOUR:  # nobody is at it any more
                shutil.rmtree(hidden, ignore_errors=True)
    with complete_or_absent_directory(directory, overwrite=True, mark=SUMS) as hidden:
        for name, half in (("encoder", network.encoder), ("decoder", network.decoder)):
            if half is not None:
                openvino.serialize(half, hidden / f"{name}.xml")
        seal(hidden / SUMS, hidden.glob(HALVES))
        hidden.chmod(0o700)


def make_ready(path: Path, mode: Mode | None) -> OnnxNetwork:
    """Read an ONNX network, ease it, cut it, and tile its first half; an engine prepares the second itself.

    Raises:
        InputError: see `read_network`.
    """
    from .linear import ease  # its libraries take a while to load

    model, found = read_network(path, mode)
    to_float32(model)  # rewriting it would be of one type; how precisely it computes is said as it is compiled
    halves = cut(ease(model), found)
    try:
        encoder = one_frame(halves.encoder) if halves.encoder else None
        decoder = one_frame(halves.decoder)
        if encoder:
            kept = range(len(encoder.outputs))
            encoder = channels_last(encoder, [], kept)
            decoder = channels_last(decoder, [k + halves.again for k in kept], [])
    except RuntimeError as error:
        reason = str(error).strip().split("\n")[-1]
        raise InputError(f"{path} is not an ONNX network that can be read: {reason}") from None
    network = OnnxNetwork(halves.mode, tile(encoder) if encoder else None, decoder, halves.again)
    del model, halves
    return_free_memory()  # now: what is compiled would lie scattered in it, and keep it
    return network


def one_frame(half: ModelProto) -> openvino.Model:
    """The half with a batch of one and float32 inputs and outputs, all shapes known."""
    model = openvino.Core().read_model(half.SerializeToString())
    model.reshape({i: [1, *list(port.partial_shape)[1:]] for i, port in enumerate(model.inputs)})
    types = preprocess.PrePostProcessor(model)
    for i in range(len(model.inputs)):
        types.input(i).tensor().set_element_type(openvino.Type.f32)
    for i in range(len(model.outputs)):
        types.output(i).tensor().set_element_type(openvino.Type.f32)
    model = types.build()
    fold(model)  # shapes are fixed now: what computes them goes away
    return model


def return_free_memory() -> None:
    """Give back to the system what was freed: glibc keeps it, 100 to 300 MB after a network was read or compiled."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)
