"""The program as users run it: what it makes, what it says, and what it refuses."""

import errno
import fcntl
import gc
import importlib
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import av
import av.error
import numpy as np
import pytest
import soundfile
import torch
from click.testing import CliRunner
from conftest import MakeTemplate, Run, landmarks, tones
from PIL import Image

from gpurender import UNet, cli
from gpurender.cli import main


@pytest.fixture
def anna(make_template: MakeTemplate, tiny_onnx: Path, tiny_encoder: Path) -> Path:
    """A template with its networks under the documented names."""
    path = make_template("anna")
    shutil.copy(tiny_onnx, path / "unet.onnx")
    shutil.copy(tiny_encoder, path / "audio_encoder.pth")
    return path


def test_template_and_audio_are_enough(run: Run, anna: Path, speech: Path, tmp_path: Path) -> None:
    result = run("make", "--template", "anna", "--audio", "speech.wav")
    assert result.exit_code == 0, result.output
    assert "wrote anna_speech.mp4: 36 frames of 320×240, 1.44 s at 25 a second" in result.output
    assert "openvino" in result.output
    assert "libx264" in result.output
    assert "rendered 36 of 36 frames" in result.stderr
    with av.open(str(tmp_path / "anna_speech.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 36
        assert container.streams.audio[0].rate == 22050
        assert container.streams.audio[0].channels == 2


def test_quiet_says_nothing(run: Run, anna: Path, speech: Path) -> None:
    result = run("make", "--template", anna, "--audio", speech, "--quiet", "--out", "a.mkv")
    assert (result.exit_code, result.output) == (0, "")


def test_a_synctalk_tree(
    run: Run, make_template: MakeTemplate, tiny_unet: Path, tiny_encoder: Path, speech: Path
) -> None:
    tree = make_template("tree/dataset/bob").parents[1]
    (tree / "checkpoint" / "bob").mkdir(parents=True)
    (tree / "model" / "checkpoints").mkdir(parents=True)
    shutil.copy(tiny_unet, tree / "checkpoint" / "bob" / "10.pth")
    (tree / "checkpoint" / "bob" / "9.pth").write_text("an older one")
    shutil.copy(tiny_encoder, tree / "model" / "checkpoints" / "audio_visual_encoder.pth")
    result = run("make", "--template", "tree/dataset/bob", "--audio", speech)
    assert result.exit_code == 0, result.output
    assert Path("bob_speech.mp4").exists()


def test_options_go_through(run: Run, anna: Path, tmp_path: Path) -> None:
    np.save("aud.npy", np.zeros((7, 512), np.float32))
    soundfile.write("s.wav", tones(0.3, 16000), 16000)
    result = run(
        *("make", "--template", anna, "--audio", "aud.npy", "--sound", "s.wav", "--out", "o.mov", "--fps", 20),
        *("--codec", "hevc", "--quality", 30, "--order", "loop", "--start-frame", 2, "--batch", 3, "--memory", 1),
        *("--device", "cpu", "--engine", "openvino", "--precision", "fp32", "--no-parsing"),
    )
    assert result.exit_code == 0, result.output
    with av.open("o.mov") as container:
        assert container.streams.video[0].average_rate == 20
        assert container.streams.video[0].codec_context.name == "hevc"
        assert container.streams.audio


def test_decoder_encoder_and_report(run: Run, anna: Path) -> None:
    np.save("aud.npy", np.zeros((7, 512), np.float32))
    result = run(
        *("make", "--template", anna, "--audio", "aud.npy", "--out", "o.mov", "--report", "o.json"),
        *("--trace", "t.json", "--decoder", "dali", "--encoder", "mjpeg", "--precision", "fp32"),
    )
    assert result.exit_code == 0, result.output
    assert "used openvino fp32 on cpu, decoder dali, encoder mjpeg" in result.output
    told = json.loads(Path("o.json").read_text())
    assert (told["frames"], told["decoder"], told["encoder"]) == (7, "dali", "mjpeg")
    traced = {event["name"] for event in json.loads(Path("t.json").read_text())["traceEvents"] if event["ph"] == "X"}
    assert traced == set(told["stage_seconds"])
    with av.open("o.mov") as container:
        assert container.streams.video[0].codec_context.name == "mjpeg"


def test_numbered_pictures(run: Run, anna: Path) -> None:
    np.save("aud.npy", np.zeros((3, 512), np.float32))
    result = run("make", "--template", anna, "--audio", "aud.npy", "--out", "frames/%04d.jpg")
    assert result.exit_code == 0, result.output
    assert sorted(os.listdir("frames")) == ["0001.jpg", "0002.jpg", "0003.jpg"]
    again = run("make", "--template", anna, "--audio", "aud.npy", "--out", "frames/%04d.jpg")
    assert again.exit_code == 2
    assert "frames/0001.jpg exists; give --overwrite" in again.stderr


def test_export(run: Run, tiny_unet: Path) -> None:
    result = run("export", tiny_unet, "--out", "a.onnx", "--max-batch", 2)
    assert result.exit_code == 0, result.output
    assert "checked with ONNX Runtime: largest difference" in result.output
    assert run("export", tiny_unet, "--out", "a.onnx").exit_code == 2


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("can't start new thread"),
        RuntimeError("Exception from src/inference/src/cpp/core.cpp:116:\nResource temporarily unavailable"),
        av.error.BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN), "a.mp4"),
    ],
)
def test_no_more_threads(run: Run, anna: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fails(*given: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(importlib.import_module("gpurender.render"), "make", fails)
    result = run("make", "--template", anna, "--audio", "hello")
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: the system gives this process no more threads; allow it a hundred or more ")


HOSTS = "DefaultCPUAllocator: can't allocate memory"
GPUS = "CUDA error: out of memory\nCUDA kernel errors might be …"
TORCHS = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 7.75 GiB of which …"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        *((kind(GPUS), "the GPU") for kind in (torch.OutOfMemoryError, torch.AcceleratorError)),
        (torch.OutOfMemoryError(TORCHS), "the GPU"),
        *((kind(HOSTS), "this machine") for kind in (MemoryError, RuntimeError)),
    ],
)
def test_no_memory_to_load_anything(
    run: Run, anna: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, told: str
) -> None:
    def fails(*given: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(importlib.import_module("gpurender.render"), "make", fails)
    result = run("make", "--template", anna, "--audio", "hello")
    assert result.exit_code == 2
    advice = "end other programs on it, or give --device cpu; or " if told == "the GPU" else ""
    first_line = str(error).splitlines()[0]
    assert result.stderr == (
        f"Error: {told} has too little free memory ({first_line}); {advice}give a smaller --batch or --memory.\n"
    )


@pytest.mark.parametrize(("allowed", "asked", "threads"), [(1, None, 1), (1, "2", 2), (2, None, None)])
def test_torch_takes_the_threads_that_control_groups_allow(
    allowed: int, asked: str | None, threads: int | None
) -> None:
    script = f"""
import os
from gpurender import cli, host
host.cores_to_run_on, host.usable_cores = lambda: 2, lambda: {allowed}
cli.main(["compare", "a.mp4", "b.mp4"], standalone_mode=False)
import torch
print(torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS"))
"""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment |= {"OMP_NUM_THREADS": asked} if asked else {}
    ran = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert "a.mp4" in ran.stderr
    count, setting = ran.stdout.split()
    assert setting == str(threads)
    assert threads is None or int(count) == threads


def test_help_teaches(run: Run) -> None:
    for words in (("--help",), ("make", "--help"), ("export", "-h"), ("--version",)):
        assert run(*words).exit_code == 0
    shown = run("make", "--help").output
    assert "gpurender make --template" in shown
    assert all(f"--{parameter.name}".replace("_", "-") in shown for parameter in main.commands["make"].params)


# --- bad input: one clear line, exit code 2, nothing lost ------------------------------------------------------------


def refused(run: Run, words: str, *arguments: object) -> None:
    before = snapshot()
    result = run("make", *arguments)
    assert result.exit_code == 2, result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1, result.stderr
    assert words in errors[0]
    assert "Traceback" not in result.output
    assert snapshot() == before


def snapshot() -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in Path().rglob("*") if file.is_file()}


def test_bad_templates(run: Run, anna: Path, make_template: MakeTemplate, speech: Path) -> None:
    refused(run, "no such template directory", "--template", "nobody", "--audio", speech)
    Path("empty").mkdir()
    refused(run, "empty is no template: it holds neither pictures", "--template", "empty", "--audio", speech)
    (anna / "landmarks" / "1.lms").unlink()
    (anna / "landmarks" / "2.lms").unlink()
    unequal = "5 frames and 3 landmark files that do not match: no landmarks for 1.jpg, 2.jpg"
    refused(run, unequal, "--template", anna, "--audio", speech)
    cases = {
        "letters": ("3 x\n" * 60, "letters/landmarks/2.lms, line 1: '3 x' is not a point"),
        "short": ("3 4\n" * 52, "short/landmarks/2.lms has 52 points; at least 53 are needed"),
        "leaves": (landmarks(250, 60, 350), "frame 2.jpg: the face rectangle (250, 60, 350, 160) leaves the frame"),
        "empty1": (landmarks(50, 60, 50), "frame 2.jpg: the face rectangle (50, 60, 50, 60) is empty"),
        "inverted": (landmarks(90, 60, 50), "(90, 60, 50, 20) is inverted"),
    }
    for name, (text, words) in cases.items():
        path = make_template(name)
        (path / "landmarks" / "2.lms").write_text(text)
        refused(run, words, "--template", path, "--audio", speech)
    path = make_template("binary")
    (path / "landmarks" / "2.lms").write_bytes(bytes(range(256)))
    refused(run, "2.lms is not a text file of landmarks", "--template", path, "--audio", speech)


def test_bad_pictures(run: Run, anna: Path, make_template: MakeTemplate, speech: Path) -> None:
    path = make_template("sizes")
    Image.new("RGB", (100, 80)).save(path / "full_body_img" / "3.jpg")
    refused(run, "3.jpg is 100×80, but 0.jpg is 320×240", "--template", path, "--audio", speech)
    path = make_template("masks", parsing=True)
    Image.new("RGB", (100, 80)).save(path / "parsing" / "3.png")
    refused(run, "parsing/3.png is 100×80", "--template", path, "--audio", speech)
    picture = anna / "full_body_img" / "3.jpg"
    whole = picture.read_bytes()
    picture.write_bytes(b"not a jpeg")
    refused(run, "3.jpg cannot be read (not a JPEG or PNG picture)", "--template", anna, "--audio", speech)
    picture.write_bytes(whole[: len(whole) // 2])
    Path("anna_speech.mp4").write_text("an earlier video")
    refused(run, "3.jpg is corrupt or truncated", "--template", anna, "--audio", speech, "--overwrite")
    assert Path("anna_speech.mp4").read_text() == "an earlier video"


def test_sound_that_no_video_can_have_is_told_before_anything_is_loaded(run: Run, anna: Path) -> None:
    soundfile.write("many.wav", np.zeros((16_000, 9)), 16_000)
    arguments = ("--template", anna, "--model", "absent.onnx")
    refused(run, "cannot make AAC of its 9 channels", *arguments, "--audio", "many.wav")
    refused(run, "absent.onnx", *arguments, "--audio", "many.wav", "--out", "a%d.png")


def test_bad_sounds_and_features(run: Run, anna: Path, tmp_path: Path) -> None:
    refused(run, "no such sound or feature file", "--template", anna, "--audio", "none.wav")
    Path("empty.wav").write_bytes(b"")
    refused(run, "empty.wav is not sound that can be decoded", "--template", anna, "--audio", "empty.wav")
    soundfile.write("nothing.wav", np.zeros(0), 16000)
    refused(run, "nothing.wav", "--template", anna, "--audio", "nothing.wav")
    with av.open("silent.mp4", "w") as container:
        stream = container.add_stream("libx264", 25)
        stream.width = stream.height = 64  # pyright: ignore
        container.mux(stream.encode(av.VideoFrame(64, 64, "yuv420p")))  # pyright: ignore
        container.mux(stream.encode(None))  # pyright: ignore
    refused(run, "silent.mp4 has no sound track", "--template", anna, "--audio", "silent.mp4")
    np.save("shape.npy", np.zeros((4, 77), np.float32))
    refused(run, "shape.npy has shape (4, 77)", "--template", anna, "--audio", "shape.npy")
    array = np.zeros((9, 512), np.float32)
    array[6, 3] = np.nan
    np.save("nan.npy", array)
    refused(run, "features of frame 6 hold NaN", "--template", anna, "--audio", "nan.npy")
    np.save("wenet.npy", np.zeros((9, 8192), np.float32))
    refused(run, "(256, 16, 32) (wenet)", "--template", anna, "--audio", "wenet.npy")


def test_silence_is_good_input(run: Run, anna: Path) -> None:
    soundfile.write("silence.wav", np.zeros(16000), 16000)
    assert run("make", "--template", anna, "--audio", "silence.wav").exit_code == 0


def test_bad_networks(run: Run, anna: Path, make_template: MakeTemplate, speech: Path, tiny_encoder: Path) -> None:
    bare = make_template("bare")
    refused(run, "no network for bare: none of generator.onnx", "--template", bare, "--audio", speech)
    shutil.copy(anna / "unet.onnx", bare)
    refused(run, "no audio encoder for bare: none of audio_encoder.onnx", "--template", bare, "--audio", speech)
    arguments = ("--template", anna, "--audio", speech)
    refused(run, "is an audio encoder, not a U-Net", *arguments, "--model", tiny_encoder)
    Path("text.pth").write_text("hello")
    refused(run, "not a checkpoint that can be loaded safely", *arguments, "--model", "text.pth")
    torch.save(UNet("wenet").state_dict(), "wenet.pth")
    refused(run, "network for wenet features, not for ave", *arguments, "--model", "wenet.pth")
    refused(run, "no such audio encoder", *arguments, "--audio-encoder", "none.pth")


def test_names_that_the_system_refuses(run: Run, anna: Path) -> None:
    refused(run, "File name too long", "--template", anna, "--audio", 300 * "a" + ".wav")
    os.mkfifo("pipe.wav")
    refused(run, "pipe.wav is a pipe or a device", "--template", anna, "--audio", "pipe.wav")
    np.save("a.npy", np.zeros((3, 512), np.float32))
    refused(run, "pipe.wav is a pipe or a device", "--template", anna, "--audio", "a.npy", "--sound", "pipe.wav")


def test_any_name_will_do(run: Run, anna: Path) -> None:
    """One with what numbers pictures, and one that is not UTF-8."""
    np.save("100% a.npy", np.zeros((3, 512), np.float32))
    assert run("make", "--template", anna, "--audio", "100% a.npy").exit_code == 0
    assert Path("anna_100_ a.mp4").exists()
    odd = os.fsdecode(b"nf\xff.npy")
    os.rename("100% a.npy", odd)
    result = run("make", "--template", anna, "--audio", odd, "--report", "report.json", "--quiet")
    assert result.exit_code == 0
    assert json.loads(Path("report.json").read_text())["out"] == f"anna_{odd[:-4]}.mp4"


def test_closed_standard_streams(run: Run, anna: Path) -> None:
    np.save("a.npy", np.zeros((3, 512), np.float32))
    command = f"{sys.executable} -m gpurender.cli make --template {anna} --audio a.npy --overwrite"
    for closed in ("2>&-", ">&-", ">&- 2>&-"):
        ended = subprocess.run(f"{command} {closed}", shell=True, capture_output=True, text=True, timeout=100)
        assert ended.returncode == 0, ended.stderr
    full = subprocess.run(f"{command} >/dev/full", shell=True, capture_output=True, text=True, timeout=100)
    assert full.returncode == 2
    assert "Error: No space left on device." in full.stderr
    assert "Traceback" not in full.stderr


def test_an_output_that_nobody_reads_is_no_verdict(tmp_path: Path) -> None:
    """`compare` ends with 1 where videos differ."""
    Image.new("RGB", (64, 64)).save(tmp_path / "1.png")
    reads, writes = os.pipe()
    os.close(reads)
    ended = subprocess.run(program("compare", tmp_path, tmp_path), stdout=writes, stderr=subprocess.PIPE, timeout=100)
    assert ended.returncode == cli.CLOSED_PIPE
    assert re.fullmatch(rb"compared 1 of 1 frames, .* a second\n", ended.stderr)
    missing = program("compare", tmp_path, tmp_path / "none")
    ended = subprocess.run(missing, stderr=writes, stdout=subprocess.PIPE, timeout=100)
    assert (ended.returncode, ended.stdout) == (cli.CLOSED_PIPE, b"")
    for words in (["--help"], ["compare", "--help"]):
        ended = subprocess.run(program(*words), stdout=writes, stderr=subprocess.PIPE, timeout=100)
        assert (ended.returncode, ended.stderr) == (cli.CLOSED_PIPE, b"")
    os.close(writes)


def test_a_working_directory_that_is_gone(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    command = f"cd {tmp_path / 'gone'}; rmdir ../gone; exec {sys.executable} -m gpurender.cli doctor"
    package = Path(cli.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(package)}
    ended = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=100, env=environment)
    assert ended.returncode == 2
    assert ended.stderr == "Error: the working directory is gone; change to another.\n"


def test_bad_outputs_and_devices(run: Run, anna: Path, speech: Path) -> None:
    arguments = ("--template", anna, "--audio", speech)
    refused(run, "the output is a video", *arguments, "--out", "a.avi")
    refused(run, "numbered pictures are named like", *arguments, "--out", "a%s.png")
    refused(run, "is not a directory", *arguments, "--out", "no/where/a.mp4")
    Path("taken.mp4").write_text("mine")
    refused(run, "taken.mp4 exists; give --overwrite", *arguments, "--out", "taken.mp4")
    refused(run, "quality 99 is not within 0 (best) to 51", *arguments, "--quality", 99)
    refused(run, "start frame 5 is not within the template's frames 0 to 4", *arguments, "--start-frame", 5)
    refused(run, "report.json is not a directory", *arguments, "--report", "report.json/a.json")
    refused(run, "report.json is not a directory", *arguments, "--trace", "report.json/a.json")
    refused(run, "a.json is named for two results", *arguments, "--report", "a.json", "--trace", "a.json")
    refused(run, "is named for two results", *arguments, "--out", "a.mp4", "--report", Path("a.mp4").absolute())
    refused(run, "speech.wav is what is read", *arguments, "--report", speech, "--overwrite")
    refused(run, "50%.json cannot be written", *arguments, "--report", "no/50%.json")
    refused(run, "unet.onnx is what is read", *arguments, "--report", anna / "unet.onnx", "--overwrite")
    refused(run, "0.lms is among what is read", *arguments, "--trace", anna / "landmarks/0.lms", "--overwrite")
    for pattern in ("full_body_img/%d.jpg", "full_body_img/%d.png", "landmarks/../full_body_img/%03d.jpg"):
        refused(run, "is among what is read; give a name outside", *arguments, "--out", anna / pattern, "--overwrite")
    refused(run, "the mjpeg encoder does not make hevc", *arguments, "--encoder", "mjpeg", "--codec", "hevc")
    refused(run, "nvdec decodes videos, but the template's frames are pictures", *arguments, "--decoder", "nvdec")
    refused(run, "'tpu' is not a device", *arguments, "--device", "tpu")
    if not torch.cuda.is_available():
        refused(run, "finds no CUDA GPU on this machine", *arguments, "--device", "cuda")
        refused(run, "the nvenc encoder takes frames on a GPU", *arguments, "--encoder", "nvenc")
        refused(run, "--engine openvino", *arguments, "--engine", "tensorrt", "--device", "cpu")


def test_a_cpu_without_half_precision(run: Run, anna: Path, speech: Path) -> None:
    refused(run, "openvino engine has no fp16", "--template", anna, "--audio", speech, "--precision", "fp16")


# --- as a process ----------------------------------------------------------------------------------------------------


SIGNALS = signal.SIGINT, signal.SIGHUP  # of which a shell's `&`, or nohup, makes a program deaf


def hears(how: signal.Handlers) -> Callable[[], object]:
    """What a program does about signals before it begins."""
    return lambda: [signal.signal(number, how) for number in SIGNALS]


def program(*words: object) -> list[str]:
    return [sys.executable, "-m", "gpurender.cli", *map(str, words)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_interrupts_leave_nothing(tmp_path: Path, anna: Path, number: signal.Signals) -> None:
    np.save(tmp_path / "long.npy", np.zeros((100_000, 512), np.float32))
    out = tmp_path / "out"
    out.mkdir()
    command = program("make", "--template", anna, "--audio", tmp_path / "long.npy", "--out", out / "a.mp4")
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=hears(signal.SIG_DFL))
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("rendered"):
            break
    process.send_signal(number)
    _, rest = process.communicate(timeout=60)
    assert list(out.iterdir()) == []
    if number != signal.SIGKILL:
        assert process.returncode == 130
        assert "Traceback" not in rest
        assert "Interrupted" in rest


def test_more_interrupts_while_it_cleans_up_are_not_heard(tmp_path: Path, anna: Path) -> None:
    np.save(tmp_path / "long.npy", np.zeros((100_000, 512), np.float32))
    command = program(
        *("reference", "--template", anna, "--audio", tmp_path / "long.npy", "--out", tmp_path / "set"),
        *("--frames", 50_000),
    )
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=hears(signal.SIG_DFL))
    assert process.stderr is not None
    for line in process.stderr:
        if " of 50000 " in line:
            break
    for _ in range(4):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.01)
    _, rest = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGTERM)  # the last may come when all is cleaned up
    assert "Traceback" not in rest
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith((".", "set"))] == []


IN_A_DESTRUCTOR = """
import os, signal, time
from gpurender import cli
class Late:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
def invoked(self, ctx):
    try:
        late = Late()
        del late
        time.sleep(50)
    except KeyboardInterrupt:
        ctx.exit(130)
cli.Commands.invoked = invoked
cli.main(["doctor"])
"""


def test_an_interrupt_that_a_destructor_swallows_comes_again(tmp_path: Path) -> None:
    ran = subprocess.run([sys.executable, "-c", IN_A_DESTRUCTOR], capture_output=True, text=True, timeout=40)
    assert (ran.returncode, ran.stderr) == (130, "")


def test_signals_that_the_shell_ignores_are_ignored(tmp_path: Path, anna: Path) -> None:
    np.save(tmp_path / "aud.npy", np.zeros((40, 512), np.float32))
    command = program("make", "--template", anna, "--audio", tmp_path / "aud.npy", "--out", tmp_path / "a.mp4")
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=hears(signal.SIG_IGN))
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("preparing") or "…" in line:
            for number in SIGNALS:
                process.send_signal(number)
            break
    process.communicate(timeout=100)
    assert process.returncode == 0
    assert (tmp_path / "a.mp4").is_file()


def test_nobody_is_told_of_a_render(tmp_path: Path) -> None:
    """OpenVINO would report its use, unless the environment says that this is a test."""
    code = (
        "import sys, gpurender.openvino_engine; print('openvino_telemetry' in sys.modules, 'openvino' in sys.modules)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "CI"} | {"HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "False True\n"
    assert list(tmp_path.iterdir()) == []


def test_sound_that_breaks_off_is_told_in_one_line(tmp_path: Path, anna: Path) -> None:
    """As a program: soxr's binding would complain at its end of a resampler that an error still holds."""
    soundfile.write(tmp_path / "whole.flac", np.random.default_rng(0).uniform(-0.5, 0.5, 40_000), 16_000)
    (tmp_path / "cut.flac").write_bytes((tmp_path / "whole.flac").read_bytes()[:30_000])
    command = program("make", "--template", anna, "--audio", tmp_path / "cut.flac", "--out", tmp_path / "a.mp4")
    ran = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert ran.returncode == 2
    reading, error = ran.stderr.splitlines()
    assert "reading cut.flac" in reading
    assert re.match(r"Error: .*cut\.flac: the sound breaks off after \d", error)


DEAF = """
import os, signal
try:
    os.kill(os.getpid(), signal.SIGTERM)
except BaseException:
    pass
finished = True
"""
INTERRUPTED = """
import signal, sys, time
from gpurender.cli import interrupted
for number in (signal.SIGTERM, signal.SIGALRM):
    signal.signal(number, interrupted)
try:
    import deaf
    time.sleep(50)
except KeyboardInterrupt:
    print(sys.modules["deaf"].finished)
"""


def test_an_interrupt_waits_for_the_end_of_an_import(tmp_path: Path) -> None:
    """Of a library that takes it for an error of its own, as some do."""
    (tmp_path / "deaf.py").write_text(DEAF)
    (tmp_path / "program.py").write_text(INTERRUPTED)
    ran = subprocess.run([sys.executable, tmp_path / "program.py"], capture_output=True, text=True, timeout=100)
    assert ran.stdout == "True\n", ran.stderr


def test_a_terminal_gets_a_bar(tmp_path: Path, anna: Path) -> None:
    np.save(tmp_path / "aud.npy", np.zeros((60, 512), np.float32))
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    command = program("make", "--template", anna, "--audio", tmp_path / "aud.npy", "--out", tmp_path / "a.mp4")
    process = subprocess.Popen(command, stderr=terminal, stdout=subprocess.DEVNULL)
    os.close(terminal)
    shown = b""
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        try:
            data = os.read(controller, 4096)
        except OSError:
            break
        if not data:
            break
        shown += data
    assert process.wait(timeout=60) == 0
    assert "60/60" in shown.decode()
    assert "frames/s" in shown.decode()


def test_garbage_is_collected_once_everything_is_imported() -> None:
    program = """
import gc
from gpurender.cli import main
try:
    main(["make", "--template", "nowhere", "--audio", "hello"])
except SystemExit as ended:
    print(ended.code, gc.isenabled(), gc.get_freeze_count() > 100_000)
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["2", "True", "True"]


def test_a_program_that_has_torch_already_is_left_alone() -> None:
    frozen = gc.get_freeze_count()
    assert CliRunner().invoke(main, ["make", "--template", "nowhere", "--audio", "hello"]).exit_code == 2
    assert gc.isenabled()
    assert gc.get_freeze_count() == frozen
