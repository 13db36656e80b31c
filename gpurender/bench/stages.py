"""Each stage of a render alone: as fast as it is when nothing else runs beside it."""

import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from fractions import Fraction
from functools import cached_property
from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor

from ..audio import load_features
from ..backdrops import Backdrops, paste_on_backdrops
from ..color import rgb_to_nv12
from ..crop import crop_and_mask
from ..encode import open_encoder
from ..host import one_torch_thread
from ..paste import paste_faces, paste_faces_nv12
from ..render import render
from ..sound import open_sound
from ..sound_track import SoundTrack
from ..template import frame_order
from ..timings import Timings
from .measured import Measured
from .subject import Loaded

LEAST_SECONDS = 0.25  # that a run of a quick stage is repeated for
DECODED = 48  # template frames
ENCODED = {"cpu": 48, "cuda": 1536}  # frames of video: as many as keep all of an encoder's segments at work
RENDERED = {"cpu": 48, "cuda": 192}  # that are encoded, over and over
SWEEP = (1, 2, 4, 8, 16, 32)  # frames at a time
SWEEPS = {"cpu": SWEEP[:-1], "cuda": SWEEP}  # each with four batches of the largest: fewer fill the stages alone
STAGES = (
    *("template decode", "template again", "audio", "crop", "network encode", "network decode", "paste"),
    *("colour", "encode", "mux"),
)


def is_once(stage: str, device: str) -> bool:
    """Whether a template's frame needs it once, however often it is shown, where memory allows keeping it."""
    return stage in ("template decode", "crop", "network encode") or (stage == "colour" and device == "cpu")


class Alone:
    """The stages of a loaded subject, to be measured one by one; all pixels are what a render would give them."""

    def __init__(self, loaded: Loaded, repeats: int) -> None:
        self._loaded = loaded
        self._repeats = repeats
        self._device = loaded.device

    def measure(self, name: str) -> list[Measured]:
        """The stage's milliseconds a frame; `encode` has mux with it, and on a GPU colour."""
        work = {
            "template decode": self._decode,
            "audio": self._audio,
            "crop": lambda: self._batched(name, lambda: crop_and_mask(self._frames, self._rects)),
            "network encode": lambda: self._batched(name, lambda: self._loaded.engine.encode(self._faces)),
            "network decode": lambda: self._batched(name, self._draw),
            "paste": lambda: self._batched(name, self._paste),
            "colour": lambda: self._batched(name, lambda: rgb_to_nv12(self._frames)),
            "encode": self._encode,
        }
        with nullcontext() if name == "audio" else self._threads_of_make():  # of which a part comes before the render
            return work[name]()

    def sweep(self, batch: int) -> list[Measured]:
        """Rendered frames a second, up to the finished pixels, with so many frames at a time; after `encode`."""
        loaded = self._loaded
        count = 4 * max(SWEEPS[self._device.type])
        with tempfile.TemporaryDirectory(prefix="gpurender-") as folder:
            file = Path(folder) / "features.npy"
            np.save(file, np.random.RandomState(0).uniform(0, 3, (count, 512)).astype(np.float32))
            features = load_features(file, device=self._device)
            runs = []
            warm_ups = 1 if self._device.type == "cuda" else 0  # a GPU prepares for each new batch
            for _ in range(warm_ups + self._repeats):
                began = time.perf_counter()
                with self._threads_of_make():
                    for _ in render(loaded.template, features, loaded.engine, batch=batch, pixels=loaded.pixels):
                        pass
                    self._finish()
                runs.append(count / (time.perf_counter() - began))
        parameters = {**loaded.parameters, "batch": batch, "frames": count}
        return [Measured(f"render, batch {batch}", parameters, "frames a second", runs[warm_ups:])]

    def _threads_of_make(self) -> AbstractContextManager[None]:
        return one_torch_thread() if self._loaded.engine.name == "openvino" else nullcontext()

    # --- what stages are given

    @cached_property
    def _indices(self) -> list[int]:
        return frame_order(len(self._loaded.template), range(self._loaded.batch))

    @cached_property
    def _shown(self) -> tuple[Tensor, Tensor | None]:
        return self._loaded.template.frames(self._indices)

    @property
    def _frames(self) -> Tensor:
        return self._shown[0]

    @property
    def _rects(self) -> Tensor:
        return self._loaded.template.rects[self._indices]

    @cached_property
    def _cropped(self) -> tuple[Tensor, Tensor]:
        """Crops, and what the network sees of them."""
        return crop_and_mask(self._frames, self._rects)

    @property
    def _faces(self) -> Tensor:
        return self._cropped[1]

    @cached_property
    def _draw(self) -> Callable[[], Tensor]:
        encoded = self._loaded.engine.encode(self._faces)
        windows = self._loaded.features.windows(0, self._loaded.batch)
        return lambda: self._loaded.engine.decode(encoded, windows)

    @cached_property
    def _paste(self) -> Callable[[], Tensor]:
        predictions, crops = self._draw(), self._cropped[0]
        if self._loaded.on_backdrops:
            behind = Backdrops(self._loaded.template, (), 0)(self._indices)
            return lambda: paste_on_backdrops(behind, crops, predictions)
        frames, keep = self._shown
        if self._loaded.pixels == "rgb":
            own = frames.clone()
            return lambda: paste_faces(own, crops, predictions, self._rects, keep, inplace=True)
        return lambda: paste_faces_nv12(frames, crops, predictions, self._rects, keep)

    @cached_property
    def _rendered(self) -> list[Tensor]:
        """Batches of about `RENDERED` finished frames."""
        batches: list[Tensor] = []
        loaded = self._loaded
        for batch in render(loaded.template, loaded.features, loaded.engine, batch=loaded.batch, pixels=loaded.pixels):
            batches.append(batch)
            if sum(map(len, batches)) >= RENDERED[self._device.type]:
                break
        return batches

    # --- how they are timed

    def _batched(self, name: str, work: Callable[[], object]) -> list[Measured]:
        frames = self._loaded.batch
        runs = [1000 * seconds / frames for seconds in timed(work, self._repeats, self._finish)]
        return [self._result(name, frames, runs)]

    def _decode(self) -> list[Measured]:
        """Also taking frames that stayed in memory, where a render keeps frames, not backdrops."""
        first, again = [], []
        numbers = range(min(len(self._loaded.template), DECODED))
        parts = [numbers[i : i + self._loaded.batch] for i in range(0, len(numbers), self._loaded.batch)]
        for _ in range(self._repeats):
            template = self._loaded.open()
            for runs in (first,) if self._loaded.on_backdrops else (first, again):
                began = time.perf_counter()
                for part in parts:
                    template.frames(part)
                self._finish()
                runs.append(1000 * (time.perf_counter() - began) / len(numbers))
        stages = (("template decode", first), ("template again", again))
        return [self._result(name, len(numbers), runs) for name, runs in stages if runs]

    def _audio(self) -> list[Measured]:
        count = len(self._loaded.features)

        def hear() -> None:
            features = self._loaded.hear()
            with self._threads_of_make():  # its encoder hears as frames are asked for, in the midst of a render
                for start in range(0, count, self._loaded.batch):
                    features.windows(start, min(start + self._loaded.batch, count))

        runs = [1000 * seconds / count for seconds in timed(hear, self._repeats, self._finish)]
        return [self._result("audio", count, runs)]

    def _encode(self) -> list[Measured]:
        """Encoding from the first frame to the last packet, of it colour by the GPU's clock; then a file of packets and
        sound."""
        runs: dict[str, list[float]] = {"colour": [], "encode": [], "mux": []}
        times = math.ceil(ENCODED[self._device.type] / sum(map(len, self._rendered)))
        count = times * sum(map(len, self._rendered))
        encoder = ""
        for _ in range(1 + self._repeats):
            timings = Timings()
            encoder, encode, mux = encode_once(self._loaded, self._rendered * times, timings)
            timings.finish()
            spent = {**timings.device_seconds, "encode": encode, "mux": mux}
            for name, so_far in runs.items():
                if name in spent:
                    so_far.append(1000 * spent[name] / count)
        parameters = {**self._loaded.parameters, "frames": count, "encoder": encoder}
        return [Measured(name, parameters, "ms a frame", values[1:]) for name, values in runs.items() if values]

    def _result(self, name: str, frames: int, runs: list[float]) -> Measured:
        return Measured(name, {**self._loaded.parameters, "frames": frames}, "ms a frame", runs)

    def _finish(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def timed(work: Callable[[], object], repeats: int, finish: Callable[[], None]) -> list[float]:
    """Seconds of some work, by several runs, each as many times in a row as it takes to be long enough to be told."""
    work()
    finish()
    began = time.perf_counter()
    work()
    finish()
    times = math.ceil(LEAST_SECONDS / max(time.perf_counter() - began, 1e-6))
    runs = []
    for _ in range(repeats):
        began = time.perf_counter()
        for _ in range(times):
            work()
        finish()
        runs.append((time.perf_counter() - began) / times)
    return runs


def encode_once(loaded: Loaded, batches: list[Tensor], timings: Timings) -> tuple[str, float, float]:
    """Encode finished frames, then put the packets and the sound into a file.

    Returns:
        the encoder's name, and the seconds that each step took.
    """
    rate = Fraction(round(loaded.features.fps))
    with tempfile.TemporaryDirectory(prefix="gpurender-") as folder, ExitStack() as files:
        source = files.enter_context(open_sound(loaded.subject.sound))
        out = str(Path(folder) / "out.mp4")
        container = av.open(out, "w", format="mp4", options={"movflags": "+faststart"})
        encoder, _ = open_encoder(loaded.subject.encoder, container, "h264", None, rate, batches[0])
        began = time.perf_counter()
        packets = list(encoder.packets(iter(batches), timings))
        encoded = time.perf_counter()
        track = SoundTrack(container, loaded.subject.sound, source)
        files.callback(track.close)
        for count, some in packets:
            container.mux(some)
            track.write_until(count / rate)
        container.close()
        return encoder.name, encoded - began, time.perf_counter() - encoded


def transferred(loaded: Loaded, work: Callable[[], int]) -> Iterator[Measured]:
    """Bytes a frame between host and GPU, as the GPU's profiler counts its copies while `work` makes some frames."""
    torch.cuda.synchronize(loaded.device)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        frames = work()
        torch.cuda.synchronize(loaded.device)
    with tempfile.TemporaryDirectory(prefix="gpurender-") as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        copies = copied_bytes(trace.read_text())
    for name, total in copies.items():
        yield Measured(name, {**loaded.parameters, "frames": frames}, "bytes a frame", [total / frames])


def copied_bytes(trace: str) -> dict[str, int]:
    """The bytes of all copies between host and device in a profiler's trace, by direction."""
    totals = {"host to device": 0, "device to host": 0}
    for event in json.loads(trace)["traceEvents"]:
        for kind, name in (("Memcpy HtoD", "host to device"), ("Memcpy DtoH", "device to host")):
            if str(event.get("name", "")).startswith(kind):
                totals[name] += int(event["args"]["bytes"])
    return totals
