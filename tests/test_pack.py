"""Template packages: what is in them, and that rendering from one is rendering from what it was made of."""

import json
import os
import shutil
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from conftest import MakeTemplate, landmarks
from PIL import Image

from gpurender import InputError, OutputError, export_onnx, make, open_template, pack, pack_template
from gpurender.cli import main
from gpurender.find import BUNDLED
from gpurender.network import Mode
from gpurender.output import complete_or_absent_directory
from gpurender.pack import write_rectangles, write_video
from gpurender.render import Silent

VIDEO = "full_body_video.mp4"


@pytest.fixture
def features(tmp_path: Path) -> Path:
    np.save(tmp_path / "aud.npy", np.random.RandomState(3).uniform(0, 2, (9, 512)).astype(np.float32))
    return tmp_path / "aud.npy"


@pytest.fixture(scope="session")
def encoder_onnx(tiny_encoder: Path) -> Path:
    out = tiny_encoder.with_suffix(".onnx")
    export_onnx(tiny_encoder, out)
    return out


@pytest.fixture
def with_networks(tiny_onnx: Path, encoder_onnx: Path) -> Any:
    def add(template: Path) -> Path:
        shutil.copy(tiny_onnx, template / "unet.onnx")
        shutil.copy(encoder_onnx, template / "audio_encoder.onnx")
        return template

    return add


def rendered(template: Path, audio: Path, out: Path, **options: Any) -> np.ndarray:
    """(n,H,W,3) of the pictures that a render makes."""
    summary = make(template, audio, out / "%d.png", precision="fp32", **options)
    return np.stack([np.asarray(Image.open(out / f"{i + 1}.png")) for i in range(summary.frames)])


def ports(file: Path) -> tuple[dict[str, list[int]], list[str]]:
    graph = onnx.load(file).graph
    inputs = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in graph.input}
    return inputs, [output.name for output in graph.output]


def listing(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def photographs(path: Path, frames: int = 6) -> Path:
    """A template directory of the avatar's head, in the JPEG files that SyncTalk_2D's tools write."""
    avatar = open_template(BUNDLED / "avatar")
    shown, _ = avatar.frames(range(frames))
    for directory in ("full_body_img", "landmarks"):
        (path / directory).mkdir(parents=True)
    for i in range(frames):
        pixels = shown[i, :, 60:700, 320:960].permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(path / "full_body_img" / f"{i}.jpg", quality=95)
        x0, y0, x1, _ = avatar.rects[i].tolist()
        (path / "landmarks" / f"{i}.lms").write_text(landmarks(x0 - 320, y0 - 60, x1 - 320))
    return path


# --- what is in a package --------------------------------------------------------------------------------------------


def test_a_package_has_what_published_ones_have(
    make_template: MakeTemplate, tiny_unet: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    path, out = make_template(parsing=True), tmp_path / "package"
    packed = pack_template(path, out, model=tiny_unet, audio_encoder=tiny_encoder)
    assert listing(out) == sorted(
        [
            *(VIDEO, "cache/crop_rectangles.json", "models/audio_encoder.onnx", "models/generator.onnx"),
            *(f"{place}/{i}.{kind}" for place, kind in (("landmarks", "lms"), ("parsing", "png")) for i in range(5)),
        ]
    )
    table = json.loads((out / "cache/crop_rectangles.json").read_text())
    template = open_template(path)
    assert table == {str(i): {"rect": template.rects[i].tolist()} for i in range(5)}
    assert ports(out / "models/generator.onnx") == (
        {"input": [0, 6, 320, 320], "audio": [0, 32, 16, 16]},
        ["output"],
    )
    assert ports(out / "models/audio_encoder.onnx") == ({"mel": [0, 1, 80, 16]}, ["emb"])
    for i in range(5):
        for name in (f"landmarks/{i}.lms", f"parsing/{i}.png"):
            assert (out / name).read_bytes() == (path / name).read_bytes()
    with av.open(str(out / VIDEO)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.average_rate, sum(1 for _ in container.decode(stream))) == (25, 5)
    video = (out / VIDEO).read_bytes()
    assert video.index(b"moov") < video.index(b"mdat")  # so that it plays while it is fetched
    assert (packed.mode, packed.networks) == ("ave", ("generator.onnx", "audio_encoder.onnx"))
    assert packed.bytes == sum((out / name).stat().st_size for name in listing(out))
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(out.stat().st_mode) == 0o777 & ~umask
    assert sorted(path.name for path in tmp_path.iterdir()) == ["anna", "package"]


def test_a_lossless_package_renders_the_same_bits(
    make_template: MakeTemplate,
    tiny_unet: Path,
    tiny_encoder: Path,
    features: Path,
    speech: Path,
    tmp_path: Path,
) -> None:
    path = make_template(width=321, height=241, parsing=True)
    shutil.copy(tiny_unet, path / "unet.pth")
    shutil.copy(tiny_encoder, path / "audio_encoder.pth")
    packed = pack_template(path, tmp_path / "package", lossless=True)
    assert packed.psnr_db == float("inf")
    with av.open(str(tmp_path / "package" / VIDEO)) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        assert container.streams.video[0].codec_context.pix_fmt == "gbrp"
    template, package = open_template(path), open_template(tmp_path / "package")
    assert torch.equal(template.frames(range(5))[0], package.frames(range(5))[0])
    assert torch.equal(template.frames(range(5))[1], package.frames(range(5))[1])  # pyright: ignore
    here = rendered(path, features, tmp_path / "a")
    there = rendered(tmp_path / "package", features, tmp_path / "b")
    assert len(here) == 9
    assert np.array_equal(here, there)
    # With sound, the encoder's checkpoint is heard by torch and its export by OpenVINO: features agree to 1e-5.
    here = rendered(path, speech, tmp_path / "c")
    there = rendered(tmp_path / "package", speech, tmp_path / "d")
    assert np.abs(here.astype(int) - there).max() <= 1


def test_a_package_is_visually_lossless(tiny_onnx: Path, features: Path, tmp_path: Path) -> None:
    path = photographs(tmp_path / "anna")
    packed = pack_template(path, tmp_path / "package", networks=False)
    assert packed.psnr_db > 45
    shown, kept = (open_template(one).frames(range(6))[0].numpy().astype(float) for one in (path, tmp_path / "package"))
    errors = np.square(shown - kept).mean((1, 2, 3))
    assert packed.psnr_db == pytest.approx(10 * np.log10(255**2 / errors.max()), abs=0.01)  # the worst frame's
    here = rendered(path, features, tmp_path / "a", model=tiny_onnx)
    there = rendered(tmp_path / "package", features, tmp_path / "b", model=tiny_onnx)
    error = np.square(here.astype(float) - there).mean((1, 2, 3))
    assert (10 * np.log10(255**2 / error)).min() > 45


def test_frames_are_numbered_anew(make_template: MakeTemplate, tmp_path: Path) -> None:
    """Pictures from 1, a gap, stray files, a last frame without landmarks: as `open_template` takes them."""
    path = make_template(frames=6, suffix=".png")
    for i in (5, 4, 3, 2, 1, 0):
        (path / "full_body_img" / f"{i}.png").rename(path / "full_body_img" / f"{i + 1}.png")
    (path / "landmarks" / "5.lms").unlink()
    (path / "full_body_img" / "3.png").unlink()
    (path / "landmarks" / "2.lms").unlink()
    (path / "landmarks" / ".DS_Store").write_bytes(b"\0")
    packed = pack_template(path, tmp_path / "package", lossless=True, networks=False)
    assert packed.template.notes == [
        "pictures are numbered from 1, landmarks from 0: paired in order",
        "the last frame, 6.png, has no landmarks and is left out",
    ]
    package = open_template(tmp_path / "package")
    assert len(package) == 4
    for number, (shown, marked) in enumerate([(1, 0), (2, 1), (4, 3), (5, 4)]):
        original = np.asarray(Image.open(path / "full_body_img" / f"{shown}.png"))
        assert np.array_equal(package.frames([number])[0][0].permute(1, 2, 0), original)
        mine, theirs = (tmp_path / "package", path)
        assert (mine / f"landmarks/{number}.lms").read_bytes() == (theirs / f"landmarks/{marked}.lms").read_bytes()
    assert package.rects.tolist() == open_template(path).rects.tolist()


def test_packing_a_package_keeps_all_of_it(make_template: MakeTemplate, with_networks: Any, tmp_path: Path) -> None:
    pack_template(with_networks(make_template(parsing=True)), tmp_path / "one")
    packed = pack_template(tmp_path / "one", tmp_path / "two", lossless=True)
    assert packed.networks == ("generator.onnx", "audio_encoder.onnx")
    one, two = listing(tmp_path / "one"), listing(tmp_path / "two")
    assert one == two
    same = [name for name in one if not name.endswith((".mp4", ".onnx"))]
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in same)


def test_a_package_as_others_publish_it(
    make_package: MakeTemplate,
    tiny_unet: Path,
    tiny_encoder: Path,
    tiny_onnx: Path,
    encoder_onnx: Path,
    speech: Path,
    tmp_path: Path,
) -> None:
    """No landmarks, no parsing, the table in the package's root: rendered with the networks in it."""
    package = make_package(frames=6)
    (package / "cache/crop_rectangles.json").rename(package / "crop_rectangles.json")
    (package / "models").mkdir()
    shutil.copy(tiny_onnx, package / "models/generator.onnx")
    shutil.copy(encoder_onnx, package / "models/audio_encoder.onnx")
    frames = rendered(package, speech, tmp_path / "a")
    others = rendered(package, speech, tmp_path / "b", model=tiny_unet, audio_encoder=tiny_encoder)
    assert np.abs(frames.astype(int) - others).max() <= 1
    assert len(frames) == 36


def test_networks_under_other_names_get_the_packages(
    make_template: MakeTemplate, tiny_onnx: Path, tiny_encoder: Path, features: Path, tmp_path: Path
) -> None:
    model = onnx.load(tiny_onnx)
    names = {"input": "picture", "audio": "sound", "output": "face"}
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
        node.doc_string = "/home/anna/export.py(12): forward"  # as torch's older exporter writes
    for value in (*model.graph.input, *model.graph.output):
        value.name = names[value.name]
    ordered = list(model.graph.input)[::-1]
    del model.graph.input[:]
    model.graph.input.extend(ordered)
    onnx.checker.check_model(model)
    path = make_template()
    onnx.save(model, path / "generator.onnx")
    with pytest.raises(InputError, match="'mel' is no kind of features; choose ave, "):
        pack_template("anna", "b", mode=cast(Any, "mel"))
    with pytest.raises(InputError, match="no audio encoder for anna"):
        pack_template(path, tmp_path / "package")
    pack_template(path, tmp_path / "package", audio_encoder=tiny_encoder, lossless=True)
    assert ports(tmp_path / "package/models/generator.onnx") == (
        {"input": [0, 6, 320, 320], "audio": [0, 32, 16, 16]},
        ["output"],
    )
    assert b"/home/anna" not in (tmp_path / "package/models/generator.onnx").read_bytes()
    assert np.array_equal(
        rendered(path, features, tmp_path / "a"), rendered(tmp_path / "package", features, tmp_path / "b")
    )


@pytest.mark.parametrize("mode", ["hubert", "wenet"])
def test_other_modes_have_no_audio_encoder(
    make_template: MakeTemplate, tiny_of: Callable[[Mode], Path], tmp_path: Path, mode: Mode
) -> None:
    path = make_template()
    shutil.copy(tiny_of(mode), path / "unet.pth")
    packed = pack_template(path, tmp_path / "package", mode=mode)
    assert (packed.mode, packed.networks) == (mode, ("generator.onnx",))
    with av.open(str(tmp_path / "package" / VIDEO)) as container:
        assert container.streams.video[0].average_rate == {"hubert": 25, "wenet": 20}[mode]
    rows = 2048 if mode == "hubert" else 8192
    np.save(tmp_path / "a.npy", np.zeros((3, rows), np.float32))
    assert len(rendered(tmp_path / "package", tmp_path / "a.npy", tmp_path / "a")) == 3
    with pytest.raises(InputError, match=f"takes {mode} features, which no audio encoder makes; leave out e.pth"):
        pack_template(path, tmp_path / "other", mode=mode, audio_encoder="e.pth")
    with pytest.raises(InputError, match=r"e.pth is to be packed, but without networks"):
        pack_template(path, tmp_path / "other", mode=mode, audio_encoder="e.pth", networks=False)


def test_a_package_has_a_keyframe_every_fifty_frames(tmp_path: Path) -> None:
    """Frames are read backwards, too."""
    write_video(tmp_path, [torch.zeros(101, 3, 48, 64, dtype=torch.uint8)], fps=25)
    with av.open(str(tmp_path / VIDEO)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    assert [i for i, packet in enumerate(packets) if packet.is_keyframe] == [0, 50, 100]


@pytest.mark.parametrize("spoiled", ["rectangles", "frames"])
def test_a_package_that_does_not_read_back_is_not_left(
    make_template: MakeTemplate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoiled: str
) -> None:
    path = make_template()
    if spoiled == "rectangles":
        monkeypatch.setattr(pack, "write_rectangles", lambda package, rects: write_rectangles(package, rects[::-1]))
    else:
        monkeypatch.setitem(pack.LOSSLESS, "crf", "20")
    with pytest.raises(OutputError, match=r"does not read back as anna|did not keep anna's frames bit for bit"):
        pack_template(path, tmp_path / "package", networks=False, lossless=True)
    assert [path.name for path in tmp_path.iterdir()] == ["anna"]


def test_names_are_small_letters_in_a_package(make_template: MakeTemplate, tmp_path: Path) -> None:
    path = make_template(parsing=True)
    for file in (*(path / "landmarks").iterdir(), *(path / "parsing").iterdir()):
        file.rename(file.with_suffix(file.suffix.upper()))
    pack_template(path, tmp_path / "package", networks=False)
    assert {Path(name).suffix for name in listing(tmp_path / "package")} == {".mp4", ".json", ".lms", ".png"}


def test_landmarks_of_some_of_a_packages_frames_are_left_out(make_package: MakeTemplate, tmp_path: Path) -> None:
    package = make_package()
    (package / "landmarks").mkdir()
    (package / "landmarks" / "0.lms").write_text(landmarks(90, 60, 210))
    pack_template(package, tmp_path / "two", networks=False)
    assert not (tmp_path / "two" / "landmarks").exists()


def test_a_network_that_is_no_audio_encoder_is_refused(
    make_template: MakeTemplate, tiny_onnx: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="an audio encoder takes a batch of"):
        pack_template(make_template(), tmp_path / "package", model=tiny_onnx, audio_encoder=tiny_onnx)
    assert [path.name for path in tmp_path.iterdir()] == ["anna"]


def test_weights_that_are_listed_as_inputs_are_not_taken_for_ports(
    make_template: MakeTemplate, tiny_onnx: Path, tiny_encoder: Path, features: Path, tmp_path: Path
) -> None:
    """As old exporters list them."""
    path, model = make_template(), onnx.load(tiny_onnx)
    weights = [onnx.helper.make_tensor_value_info(w.name, w.data_type, w.dims) for w in model.graph.initializer]
    model.graph.input.extend(weights)
    onnx.save(model, path / "generator.onnx")
    pack_template(path, tmp_path / "package", audio_encoder=tiny_encoder, lossless=True)
    here, there = (rendered(one, features, tmp_path / one.name / "out") for one in (path, tmp_path / "package"))
    assert np.array_equal(here, there)


def test_a_network_that_uses_a_ports_name_for_something_else_is_told(
    make_template: MakeTemplate, tiny_onnx: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    model = onnx.load(tiny_onnx)
    inner = model.graph.node[3].output[0]
    names = {"input": "picture", inner: "input"}
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    model.graph.input[0].name = "picture"
    del model.graph.value_info[:]
    onnx.save(model, tmp_path / "a.onnx")
    with pytest.raises(InputError, match=r"a\.onnx uses the name input for something else; export the checkpoint"):
        pack_template(make_template(), tmp_path / "out", model=tmp_path / "a.onnx", audio_encoder=tiny_encoder)


# --- complete or absent ----------------------------------------------------------------------------------------------


class Interrupting(Silent):
    def frames(self, batches: Iterable[torch.Tensor], total: int) -> Iterable[torch.Tensor]:
        for number, batch in enumerate(batches):
            if number == 1:
                raise KeyboardInterrupt
            yield batch


class Disconnected(Silent):
    def frames(self, batches: Iterable[torch.Tensor], total: int) -> Iterable[torch.Tensor]:
        yield from batches
        raise ConnectionResetError(104, "reset")


@pytest.mark.parametrize("lossless", [False, True])
def test_an_error_of_the_progress_is_not_the_outputs(
    make_template: MakeTemplate, tmp_path: Path, lossless: bool
) -> None:
    with pytest.raises(ConnectionResetError):
        pack_template(make_template(), tmp_path / "package", networks=False, lossless=lossless, progress=Disconnected())
    assert [path.name for path in tmp_path.iterdir()] == ["anna"]


@pytest.mark.parametrize("lossless", [False, True])
def test_interrupted_or_damaged_nothing_appears(make_template: MakeTemplate, tmp_path: Path, lossless: bool) -> None:
    path = make_template(frames=20)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(KeyboardInterrupt):
        pack_template(path, out / "package", networks=False, lossless=lossless, progress=Interrupting())
    assert list(out.iterdir()) == []
    pack_template(path, out / "package", networks=False)
    before = {name: (out / "package" / name).read_bytes() for name in listing(out / "package")}
    damaged = path / "full_body_img" / "17.jpg"
    damaged.write_bytes(damaged.read_bytes()[:3000])
    with pytest.raises(InputError, match=r"17\.jpg is corrupt or truncated"):
        pack_template(path, out / "package", networks=False, lossless=lossless, overwrite=True)
    assert [path.name for path in out.iterdir()] == ["package"]
    assert {name: (out / "package" / name).read_bytes() for name in listing(out / "package")} == before


def test_overwriting(make_template: MakeTemplate, tmp_path: Path) -> None:
    one, two, out = make_template("one", parsing=True), make_template("two", frames=3), tmp_path / "package"
    out.mkdir()  # empty: nothing is lost
    pack_template(one, out, networks=False)
    with pytest.raises(OutputError, match="package exists; give --overwrite to replace it"):
        pack_template(two, out, networks=False)
    pack_template(two, out, networks=False, overwrite=True)
    assert len(open_template(out)) == 3
    assert not (out / "parsing").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "package", "two"]


def test_only_packages_are_replaced(make_template: MakeTemplate, tmp_path: Path, tiny_unet: Path) -> None:
    path = make_template()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("mine")
    with pytest.raises(OutputError, match=r"home has no full_body_video\.mp4: it is something else"):
        pack_template(path, tmp_path / "home", networks=False, overwrite=True)
    with pytest.raises(OutputError, match="is something else, and is not replaced"):
        pack_template(path, path, networks=False, overwrite=True)
    pack_template(path, tmp_path / "package", networks=False)
    with pytest.raises(OutputError, match="package holds .*, which is read and would be gone; give another name"):
        pack_template(tmp_path / "package", tmp_path / "package", networks=False, overwrite=True)
    shutil.copy(tiny_unet, tmp_path / "package" / "mine.pth")
    with pytest.raises(OutputError, match=r"package holds .*mine\.pth, which is read and would be gone"):
        pack_template(path, tmp_path / "package", model=tmp_path / "package" / "mine.pth", overwrite=True)
    with pytest.raises(OutputError, match=r"package holds .*mine\.pth, which is read and would be gone"):
        pack_template(path, tmp_path / "package", audio_encoder=tmp_path / "package" / "mine.pth", overwrite=True)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "package")
    for name in ("file", "link"):
        with pytest.raises(OutputError, match=f"{name} exists and is not a directory of its own"):
            pack_template(path, tmp_path / name, networks=False, overwrite=True)
    assert listing(tmp_path / "home") == ["thesis.tex"]


def test_a_directory_that_comes_up_meanwhile_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def make_it_meanwhile() -> None:
        with complete_or_absent_directory(out, False, "mark") as directory:
            (directory / "mark").write_text("ours")
            out.mkdir()
            (out / "mark").write_text("theirs")

    with pytest.raises(OutputError, match="out exists; give --overwrite"):
        make_it_meanwhile()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "mark").read_text() == "theirs"


def test_errors_name_the_package_not_the_hidden_directory(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError) as raised,
        complete_or_absent_directory(tmp_path / "out", False, "mark") as directory,
    ):
        raise OutputError(f"the disk is full: {directory / VIDEO} could not be finished.")
    assert str(raised.value) == f"the disk is full: {tmp_path / 'out' / VIDEO} could not be finished."


# --- the command -----------------------------------------------------------------------------------------------------


def run(*words: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False)
    return result.exit_code, result.stdout, result.stderr


def test_the_commands_words(
    make_template: MakeTemplate, with_networks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with_networks(make_template(parsing=True))
    code, said, progress = run("pack", "anna", "--out", "package", "--lossless")
    assert code == 0
    assert "wrote package: 5 frames of 320×240, bit for bit the template's, with parsing, generator.onnx and" in said
    assert "audio_encoder.onnx for ave features; " in said
    assert "packed 5 of 5 frames" in progress
    assert run("pack", "anna", "--out", "quiet", "--no-networks", "--quiet") == (0, "", "")
    code, said, _ = run("pack", "anna", "--out", "package", "--no-networks", "--overwrite")
    assert code == 0
    assert "dB PSNR of the template's, with parsing, no networks" in said


def test_bad_input_is_one_line(
    make_template: MakeTemplate, tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_template("anna")
    make_template("odd", width=321)
    np.save("shape.npy", np.zeros((4, 77), np.float32))
    np.save("good.npy", np.zeros((4, 512), np.float32))
    Path("noise.bin").write_bytes(b"\0" * 2048)
    Path("text.wav").write_text("hello")
    before = listing(tmp_path)
    for words, expected in (
        (("pack", "none", "--out", "p"), "none: there is no such template directory"),
        (("pack", "anna", "--out", "p"), "no network for anna"),
        (("pack", "anna", "--out", "p", "--model", "text.wav"), "a network is an .onnx export or a .pth checkpoint"),
        (("pack", "anna", "--out", "p", "--model", "none.pth"), "no such checkpoint"),
        (("pack", "anna", "--out", "p", "--model", tiny_encoder), "is an audio encoder, not a U-Net"),
        (("pack", "anna", "--out", "no/where", "--no-networks"), "no is not a directory"),
        (("pack", "anna", "--out", "text.wav", "--no-networks"), "text.wav exists and is not a directory"),
        (("pack", "odd", "--out", "p", "--no-networks"), "even sizes only; give --lossless"),
        (("features", "text.wav", "--out", "a.npy"), "text.wav is sound, which needs an audio encoder"),
        (("features", "text.wav", "--out", "a.npy", "--template", "anna"), "no audio encoder for anna"),
        (("features", "text.wav", "--out", "a.npy", "--audio-encoder", tiny_encoder), "is not sound that can be"),
        (("features", "none.wav", "--out", "a.npy", "--audio-encoder", tiny_encoder), "no such sound or feature file"),
        (("features", "shape.npy", "--out", "a.bin"), "shape.npy has shape (4, 77)"),
        (("features", "noise.bin", "--out", "a.npy"), "noise.bin needs noise.bin.json beside it"),
        (("features", "good.npy", "--out", "a.wav"), "a feature file is named .npy, or .bin"),
        (("features", "good.npy", "--out", "shape.npy"), "shape.npy exists; give --overwrite"),
        (("features", "good.npy", "--out", "no/a.npy"), "no is not a directory"),
        (("export", "none.pth", "--out", "a.onnx"), "no such checkpoint"),
        (("export", "text.wav", "--out", "a.mlpackage"), "not a checkpoint that can be loaded safely"),
        (("export", tiny_encoder, "--out", "a.onnx", "--precision", "fp16"), "exported in fp32 only"),
        (
            ("export", tiny_encoder, "--out", "a.mlpackage", "--precision", "fp32"),
            "Core ML is fp16 with a batch of 1; leave out",
        ),
        (("export", tiny_encoder, "--out", "a.mlpackage", "--max-batch", "8"), "Core ML is fp16 with a batch of 1"),
    ):
        code, said, complaint = run(*words)
        (line,) = [line for line in complaint.splitlines() if not line.endswith(" …")]
        assert (code, said) == (2, ""), words
        assert line.startswith("Error: ")
        assert expected in line
    assert listing(tmp_path) == before
