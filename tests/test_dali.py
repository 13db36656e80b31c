import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MakeTemplate, opencv, picture, turned
from PIL import Image
from test_pictures import ENCODED, PHOTO, encode

from gpurender import DeviceError, InputError, open_template
from gpurender.dali_pictures import AT_ONCE, DaliPictures, load_dali, unfit
from gpurender.decoders import choose_picture_decoder
from gpurender.pictures import Pictures, keep_mask, open_pictures, read_picture

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="DALI is for Linux only")
CPU = torch.device("cpu")


def by_dali(files: list[Path], device: torch.device = CPU) -> tuple[list[np.ndarray], list[str]]:
    """Pixels of pictures, which may differ in size, and what the decoder notes."""
    frames, notes = [], []
    for file in files:
        frames += DaliPictures(open_pictures([file]), device, notes).frames([0])
    assert all(frame.is_contiguous() and frame.device.type == device.type for frame in frames)
    return [frame.cpu().numpy() for frame in frames], notes


def write_pictures(path: Path, count: int, suffix: str = ".jpg") -> list[Path]:
    files = [path / f"{i}{suffix}" for i in range(count)]
    for i, file in enumerate(files):
        Image.fromarray(picture(117, 83, i)).save(file)
    return files


# --- pixels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENCODED)
def test_pixels_are_opencvs(tmp_path: Path, name: str) -> None:
    file = encode(tmp_path, name)
    (pixels,), notes = by_dali([file])
    np.testing.assert_array_equal(pixels, opencv(file))
    sixteen = ["0.png is decoded by Pillow, not by DALI (16 bits a channel); so may others be"]
    assert notes == (sixteen if name == "sixteen bits of grey" else [])


def test_rare_kinds_are_pillows(tmp_path: Path) -> None:
    photo = Image.fromarray(PHOTO)
    files = [tmp_path / name for name in ("palette.png", "transparent.png", "cmyk.jpg", "rgb.jpg")]
    photo.quantize(50).save(files[0])
    photo.quantize(50).save(files[1], transparency=3)
    photo.convert("CMYK").save(files[2])
    photo.save(files[3], keep_rgb=True)
    for file, pixels in zip(files, by_dali(files)[0], strict=True):
        np.testing.assert_array_equal(pixels, read_picture(file).numpy(), err_msg=file.name)


def test_names_may_be_any(tmp_path: Path) -> None:
    file = tmp_path / "s3: ü %d.jpg"
    Image.fromarray(PHOTO).save(file)
    np.testing.assert_array_equal(by_dali([file])[0][0], opencv(file))


def test_any_order_and_number(tmp_path: Path) -> None:
    files = write_pictures(tmp_path, 3)
    source = DaliPictures(open_pictures(files), CPU, [])
    assert source.frames([]) == []
    order = [2, 0, 0, 1] * AT_ONCE
    for i, frame in zip(order, source.frames(order), strict=True):
        np.testing.assert_array_equal(frame.numpy(), opencv(files[i]))


def test_threads_take_turns(tmp_path: Path) -> None:
    files = write_pictures(tmp_path, 4)
    source, wrong = DaliPictures(open_pictures(files), CPU, []), []

    def read(first: int) -> None:
        for i in [first, 3 - first, first]:
            if not np.array_equal(source.frames([i])[0].numpy(), opencv(files[i])):
                wrong.append(i)

    threads = [threading.Thread(target=read, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_without_memory_no_picture_is_blamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DALI says it by `std::bad_alloc`, of which Python's side of it makes a MemoryError."""

    def fails(files: list[Path]) -> list[torch.Tensor]:
        raise MemoryError("std::bad_alloc")

    source = DaliPictures(open_pictures(write_pictures(tmp_path, 2)), CPU, notes := [])
    monkeypatch.setattr(source, "_decode_by_dali", fails)
    with pytest.raises(MemoryError):
        source.frames([0, 1])
    assert notes == []


@pytest.mark.gpu
@pytest.mark.parametrize("name", ENCODED)
def test_a_gpus_pixels_are_near_opencvs(tmp_path: Path, name: str) -> None:
    file = encode(tmp_path, name)
    (pixels,), _ = by_dali([file], torch.device("cuda"))
    off = np.abs(pixels.astype(int) - opencv(file))
    assert off.max() <= 2
    assert off.mean() <= 0.5


@pytest.mark.gpu
def test_a_gpus_frames_are_ready_on_any_stream(tmp_path: Path) -> None:
    files = write_pictures(tmp_path, 8)
    source = DaliPictures(open_pictures(files), torch.device("cuda"), [])
    for _ in range(20):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            sums = [frame.sum(dtype=torch.int64) for frame in source.frames(range(8))]
        stream.synchronize()
        for total, file in zip(sums, files, strict=True):
            assert abs(total.item() - int(opencv(file).sum())) <= 0.5 * 3 * 117 * 83


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
@pytest.mark.parametrize("kept", [0.01, 0.5, 0.99])
def test_a_damaged_picture_is_named_and_the_others_decode(
    tmp_path: Path, device: torch.device, suffix: str, kept: float
) -> None:
    files = write_pictures(tmp_path, 5, suffix)
    source = DaliPictures(open_pictures(files), device, [])
    content = files[2].read_bytes()
    files[2].write_bytes(content[: int(len(content) * kept)])
    for _ in range(2):
        with pytest.raises(InputError, match=rf"{files[2].name} is corrupt or truncated \(.+\)\."):
            source.frames(range(5))
        for i, frame in zip((0, 1, 3, 4), source.frames([0, 1, 3, 4]), strict=True):
            assert np.abs(frame.cpu().numpy().astype(int) - opencv(files[i])).mean() <= 0.5 * (device != CPU)
    files[2].write_bytes(content)
    assert np.abs(source.frames([2])[0].cpu().numpy().astype(int) - opencv(files[2])).mean() <= 0.5 * (device != CPU)


def test_a_picture_that_only_pillow_reads_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = write_pictures(tmp_path, 3)
    source = DaliPictures(open_pictures(files), CPU, notes := [])
    decode, asked = source._dali.imread, []

    def picky(names: list[str], **options: object) -> object:
        asked.append(len(names))
        if str(files[1]) in names:
            raise RuntimeError("Failed to decode sample #1 : \nmore")
        return decode(names, **options)

    monkeypatch.setattr(source._dali, "imread", picky)
    for _ in range(2):
        for i, frame in enumerate(source.frames(range(3))):
            np.testing.assert_array_equal(frame.numpy(), opencv(files[i]))
    assert asked == [3, 1, 1, 1, 2]  # all, one by one, then without that one
    assert notes == ["1.jpg is decoded by Pillow, not by DALI (Failed to decode sample #1); so may others be"]


def test_a_jpeg_without_an_end_goes_to_pillow(tmp_path: Path) -> None:
    files = write_pictures(tmp_path, 3)
    files[0].write_bytes(files[0].read_bytes() + bytes(100))
    files[1].write_bytes(files[1].read_bytes() + b"more")  # after the end: Pillow reads it
    assert [unfit(file) for file in files] == [None, "it does not end as a JPEG ends", None]
    source = DaliPictures(open_pictures(files), CPU, notes := [])
    for i, frame in enumerate(source.frames(range(3))):
        np.testing.assert_array_equal(frame.numpy(), opencv(files[i]))
    assert notes == ["1.jpg is decoded by Pillow, not by DALI (it does not end as a JPEG ends); so may others be"]


def test_a_picture_that_changes_its_size_or_goes_away_is_told(tmp_path: Path) -> None:
    files = write_pictures(tmp_path, 3)
    source = DaliPictures(open_pictures(files), CPU, [])
    Image.fromarray(picture(100, 83, 1)).save(files[1])
    files[2].unlink()
    with pytest.raises(InputError, match=r"1\.jpg is not 117×83 any more"):
        source.frames([0, 1])
    with pytest.raises(InputError, match=r"2\.jpg is corrupt or truncated \(.*No such file"):
        source.frames([0, 2])


# --- in a template ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_a_template_by_dali_is_a_template_by_pillow(make_template: MakeTemplate, suffix: str) -> None:
    path = make_template(parsing=True, suffix=suffix)
    dali, pillow = (open_template(path, decoder=name) for name in ("dali", "pillow"))
    assert (dali.decoder, pillow.decoder, dali.notes) == ("dali", "pillow", [])
    for ours, theirs in zip(dali.frames([3, 0, 3]), pillow.frames([3, 0, 3]), strict=True):
        assert ours is not None
        assert theirs is not None
        assert torch.equal(ours, theirs)


def test_turned_pictures(make_template: MakeTemplate) -> None:
    path = make_template(frames=1, width=240, height=320)
    file = path / "full_body_img/0.jpg"
    Image.open(file).copy().save(file, exif=turned(6))
    template = open_template(path, decoder="dali")
    assert (template.width, template.height) == (320, 240)
    np.testing.assert_array_equal(template.frames([0])[0][0].numpy(), opencv(file))


@pytest.mark.gpu
def test_masks_on_a_gpu_are_exact(make_template: MakeTemplate) -> None:
    path = make_template(parsing=True)
    template = open_template(path, device="cuda")
    assert template.decoder == "dali"
    _, keep = template.frames([2])
    assert keep is not None
    assert torch.equal(keep[0].cpu(), keep_mask(read_picture(path / "parsing/2.png")))


def test_the_sample(shared: Path) -> None:
    path = shared / "sample" / "template"
    template = open_template(path, decoder="dali")
    frames, _ = template.frames([0, 23])
    for frame, i in zip(frames, (0, 23), strict=True):
        np.testing.assert_array_equal(frame.numpy(), opencv(path / f"full_body_img/{i}.jpg"))


# --- who decodes -----------------------------------------------------------------------------------------------------


def test_a_cpu_has_pillow(make_template: MakeTemplate) -> None:
    assert open_template(make_template()).decoder == "pillow"


@pytest.mark.parametrize("decoder", ["nvdec", "pyav"])
def test_pictures_are_no_videos_to_decode(make_template: MakeTemplate, decoder: str) -> None:
    with pytest.raises(InputError, match=rf"{decoder} decodes videos, .* are pictures: auto, dali or pillow do"):
        open_template(make_template(), decoder=decoder)  # pyright: ignore


def test_without_dali_pillow_decodes_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError("No module named 'nvidia'", name="nvidia")

    monkeypatch.setattr("gpurender.dali_pictures.importlib.import_module", missing)
    pictures = open_pictures(write_pictures(tmp_path, 1))
    words = r"DALI is not installed; on Linux, pip install 'gpurender\[gpu\]'"
    with pytest.raises(DeviceError, match=words):
        load_dali()
    with pytest.raises(DeviceError, match=words):
        choose_picture_decoder(pictures, "dali", CPU, [])
    source, name = choose_picture_decoder(pictures, "auto", torch.device("cuda"), notes := [])
    assert (isinstance(source, Pictures), name) == (True, "pillow")
    assert notes == [
        "pictures are decoded by Pillow on the CPU: DALI is not installed; on Linux, pip install 'gpurender[gpu]'."
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_told(tmp_path: Path) -> None:
    pictures, cuda = open_pictures(write_pictures(tmp_path, 1)), torch.device("cuda")
    with pytest.raises(DeviceError, match=r"DALI does not decode on cuda \(.+\)\.$"):
        choose_picture_decoder(pictures, "dali", cuda, [])
    assert choose_picture_decoder(pictures, "auto", cuda, notes := [])[1] == "pillow"
    assert notes[0].startswith("pictures are decoded by Pillow on the CPU: DALI does not decode on cuda (")


def test_pixels_that_are_far_from_pillows_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DaliPictures, "_difference_from_pillow", lambda self: 9.94)
    with pytest.raises(DeviceError, match="DALI's pixels on cpu are 9.9 levels from Pillow's"):
        DaliPictures(open_pictures(write_pictures(tmp_path, 1)), CPU, [])
