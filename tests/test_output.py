"""Files appear complete or not at all, whatever stops the work: errors, signals, full disks."""

import errno
import gc
import os
import resource
import shutil
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice, repeat
from pathlib import Path
from typing import IO, cast

import av
import numpy as np
import pytest
import soundfile
import torch
from conftest import REPEATABLE_WIDTH
from PIL import Image

from gpurender import OutputError, write_frames
from gpurender import output as output_module
from gpurender.output import check_output, check_output_directory, complete_or_absent, complete_or_absent_directory

Listing = dict[str, bytes | None]


@pytest.fixture(params=["nameless", "named"])
def way(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to write a file: one without a name, and a hidden one where the system cannot do that."""
    if request.param == "named":
        monkeypatch.setattr(output_module, "_open_nameless", lambda directory: None)
    else:
        need_nameless(tmp_path)
    return request.param


def need_nameless(directory: Path) -> None:
    descriptor = output_module._open_nameless(directory)
    if descriptor is None:
        pytest.skip(f"the file system of {directory} has no files without names (O_TMPFILE)")
    os.close(descriptor)


def listing(directory: Path) -> Listing:
    """Everything below a directory, with its content."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None for path in directory.rglob("*")
    }


def noise(count: int, seed: int = 1, width: int = 64) -> torch.Tensor:
    """(count,3,48,width) uint8 that does not compress."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 48, width), dtype=torch.uint8, generator=generator)


def frames_in(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def assert_pictures_complete(directory: Path, frames: torch.Tensor) -> int:
    """Pictures 1..n are there and nothing else; n."""
    names = {path.name for path in directory.iterdir()}
    assert names == {f"{i}.png" for i in range(1, len(names) + 1)}
    for i in range(len(names)):
        frame = frames[i % len(frames)].permute(1, 2, 0).numpy()
        assert np.array_equal(np.asarray(Image.open(directory / f"{i + 1}.png")), frame)
    return len(names)


def write(
    path: Path, *, overwrite: bool = False, content: bytes = b"new", meanwhile: Callable[[], object] | None = None
) -> None:
    with complete_or_absent(path, overwrite) as name:
        Path(name).write_bytes(content)
        if meanwhile is not None:
            meanwhile()


# --- one file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_appears_when_it_is_complete(tmp_path: Path, way: str, overwrite: bool) -> None:
    with complete_or_absent(tmp_path / "a.bin", overwrite) as name:
        Path(name).write_bytes(b"new")
        assert not (tmp_path / "a.bin").exists()
        assert len(listing(tmp_path)) == (way == "named")
    assert listing(tmp_path) == {"a.bin": b"new"}


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.usefixtures("way")
def test_permissions_follow_the_umask(tmp_path: Path, umask: int, mode: int, overwrite: bool) -> None:
    before = os.umask(umask)
    try:
        write(tmp_path / "a.bin", overwrite=overwrite)
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert (tmp_path / "a.bin").stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, GeneratorExit, OSError])
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.usefixtures("way")
def test_nothing_is_left_after_an_error(tmp_path: Path, error: type[BaseException], overwrite: bool) -> None:
    if overwrite:
        (tmp_path / "a.bin").write_bytes(b"old")
    before, descriptors = listing(tmp_path), os.listdir("/proc/self/fd")

    def fail() -> None:
        raise error

    with pytest.raises(error):
        write(tmp_path / "a.bin", overwrite=overwrite, meanwhile=fail)
    assert listing(tmp_path) == before
    assert os.listdir("/proc/self/fd") == descriptors


@pytest.mark.usefixtures("way")
def test_overwriting_happens_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    seen: list[bytes] = []
    write(path, overwrite=True, meanwhile=lambda: seen.append(path.read_bytes()))
    assert seen == [b"old"]
    assert listing(tmp_path) == {"a.bin": b"new"}


@pytest.mark.usefixtures("way")
def test_a_file_that_comes_up_meanwhile_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with pytest.raises(OutputError, match=r"a\.bin has come up during the work; give --overwrite"):
        write(path, meanwhile=lambda: path.write_bytes(b"another's"))
    assert listing(tmp_path) == {"a.bin": b"another's"}


@pytest.mark.usefixtures("way")
def test_overwriting_what_comes_and_goes_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write(path, overwrite=True, meanwhile=lambda: path.write_bytes(b"another's"))
    assert listing(tmp_path) == {"a.bin": b"new"}
    write(path, overwrite=True, content=b"newer", meanwhile=path.unlink)
    assert listing(tmp_path) == {"a.bin": b"newer"}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.usefixtures("way")
def test_a_directory_that_comes_up_meanwhile_is_kept(tmp_path: Path, overwrite: bool) -> None:
    path = tmp_path / "a.bin"
    with pytest.raises(OutputError):
        write(path, overwrite=overwrite, meanwhile=path.mkdir)
    assert listing(tmp_path) == {"a.bin": None}


@pytest.mark.usefixtures("way")
def test_a_directory_that_goes_meanwhile_is_an_output_error(tmp_path: Path) -> None:
    directory = tmp_path / "d"
    directory.mkdir()
    with pytest.raises(OutputError, match="could not be written"):
        write(directory / "a.bin", meanwhile=lambda: shutil.rmtree(directory))
    assert listing(tmp_path) == {}


@pytest.mark.usefixtures("way")
def test_the_longest_name_can_be_overwritten(tmp_path: Path) -> None:
    path = tmp_path / ("a" * 251 + ".mp4")
    write(path, overwrite=True)
    write(path, overwrite=True, content=b"newer")
    assert listing(tmp_path) == {path.name: b"newer"}


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL])
def test_file_systems_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """exFAT, say: neither nameless files nor links."""

    def refuse(*args: object, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(output_module, "_open_nameless", lambda directory: None)
    monkeypatch.setattr(os, "link", refuse)
    write(tmp_path / "a.bin")
    assert listing(tmp_path) == {"a.bin": b"new"}
    with pytest.raises(OutputError, match=r"b\.bin has come up"):
        write(tmp_path / "b.bin", meanwhile=lambda: (tmp_path / "b.bin").write_bytes(b"another's"))
    assert listing(tmp_path) == {"a.bin": b"new", "b.bin": b"another's"}


def test_links_are_not_asked_to_be_followed_where_there_are_no_nameless_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python 3.14 refuses that under Windows."""
    link = os.link

    def windows(source: str, path: Path, *, src_dir_fd: None = None, follow_symlinks: bool | None = None) -> None:
        if src_dir_fd is not None or follow_symlinks:
            raise NotImplementedError
        link(source, path)

    monkeypatch.setattr(output_module, "_open_nameless", lambda directory: None)
    monkeypatch.setattr(os, "link", windows)
    write(tmp_path / "a.bin")
    assert listing(tmp_path) == {"a.bin": b"new"}


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL])
def test_file_systems_without_nameless_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    plain_open = os.open

    def open_named(path: str | Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(number, os.strerror(number))
        return plain_open(path, flags, mode)

    monkeypatch.setattr(os, "open", open_named)
    write(tmp_path / "a.bin")
    assert listing(tmp_path) == {"a.bin": b"new"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(OutputError, match="is not yours to write to"):
        write(tmp_path / "a.bin")


# --- errors and signals amid a video ---------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.usefixtures("way")
def test_an_error_amid_a_video_leaves_nothing(tmp_path: Path, suffix: str, overwrite: bool) -> None:
    out = tmp_path / f"a{suffix}"
    if overwrite:
        out.write_bytes(b"old")
    soundfile.write(tmp_path / "a.wav", np.zeros(16000), 16000)
    before, descriptors = listing(tmp_path), os.listdir("/proc/self/fd")

    def batches() -> Iterator[torch.Tensor]:
        yield noise(200)
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        write_frames(batches(), out, fps=25, sound=tmp_path / "a.wav", overwrite=overwrite)
    assert listing(tmp_path) == before
    assert os.listdir("/proc/self/fd") == descriptors


CHILD = """
import signal, sys, time, torch
from gpurender import write_frames
signal.signal(signal.SIGINT, signal.default_int_handler)
def batches():
    yield torch.randint(0, 256, (200, 3, 48, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    print("amid", flush=True)
    time.sleep(60)
write_frames(batches(), sys.argv[1], fps=25, overwrite=True)
"""


def test_signals_amid_a_video_leave_nothing(tmp_path: Path) -> None:
    need_nameless(tmp_path)
    signals = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]
    children: list[subprocess.Popen[str]] = []
    for sent in signals:  # together: most of the time goes into imports
        directory = tmp_path / sent.name
        directory.mkdir()
        (directory / "old.mp4").write_bytes(b"old")
        name = "new.mp4" if sent == signal.SIGKILL else "old.mp4"
        children.append(start_child(directory / name))
    for sent, child in zip(signals, children, strict=True):
        send_amid(child, sent, written=100_000)
        assert listing(tmp_path / sent.name) == {"old.mp4": b"old"}


def test_pictures_that_are_there_after_a_kill_are_complete(tmp_path: Path) -> None:
    need_nameless(tmp_path)
    send_amid(start_child(tmp_path / "%d.png"), signal.SIGKILL)
    assert assert_pictures_complete(tmp_path, noise(200)) > 100


def start_child(out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def send_amid(child: subprocess.Popen[str], sent: signal.Signals, written: int = 0) -> None:
    """Send a signal when the child has passed its frames, and written so many bytes to a file without a name."""
    try:
        assert cast(IO[str], child.stdout).readline() == "amid\n"
        assert nameless_bytes(child.pid) >= written
        child.send_signal(sent)
        assert child.wait(20) == -sent
    finally:
        child.kill()
        child.communicate()


def nameless_bytes(pid: int) -> int:
    links = [link for link in Path(f"/proc/{pid}/fd").iterdir() if os.readlink(link).endswith(" (deleted)")]
    return max((link.stat().st_size for link in links), default=0)


# --- full disks ------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 KB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "none", disk], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    yield disk
    # Lazily: PyAV leaves a file open where not even its header could be written.
    subprocess.run(["umount", "--lazy", disk], check=True)


@contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """No file of this process can grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
@pytest.mark.usefixtures("way")
def test_a_video_that_fills_the_disk_leaves_nothing(small_disk: Path, suffix: str) -> None:
    free = os.statvfs(small_disk).f_bfree
    with pytest.raises(OutputError, match="the disk is full: .*nothing was left there"):
        write_frames(islice(repeat(noise(10)), 100), small_disk / f"a{suffix}", fps=25)
    assert listing(small_disk) == {}
    assert os.statvfs(small_disk).f_bfree == free


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
@pytest.mark.parametrize("pages", [0, 1])
@pytest.mark.usefixtures("way")
def test_a_disk_that_is_full_when_a_video_is_closed(small_disk: Path, suffix: str, pages: int) -> None:
    """FFmpeg has yet to write the few frames when it is told to close."""
    statistics = os.statvfs(small_disk)
    (small_disk / "filler").write_bytes(bytes(statistics.f_bsize * (statistics.f_bfree - pages)))
    with pytest.raises(OutputError, match="the disk is full"):
        write_frames([noise(3)], small_disk / f"a{suffix}", fps=25)
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


@pytest.mark.usefixtures("way")
def test_an_old_video_survives_a_full_disk(small_disk: Path) -> None:
    write_frames([noise(5)], small_disk / "a.mp4", fps=25)
    before = listing(small_disk)
    with pytest.raises(OutputError, match="the disk is full"):
        write_frames(islice(repeat(noise(10)), 100), small_disk / "a.mp4", fps=25, overwrite=True)
    assert listing(small_disk) == before


@pytest.mark.parametrize("name", ["%d.png", "frames/%d.png"])
@pytest.mark.usefixtures("way")
def test_pictures_that_fill_the_disk_are_complete(small_disk: Path, name: str) -> None:
    with pytest.raises(OutputError, match="the disk is full") as caught:
        write_frames(islice(repeat(noise(10)), 100), small_disk / name, fps=25)
    count = assert_pictures_complete((small_disk / name).parent, noise(10))
    assert count > 10
    assert str(caught.value).endswith(f"The first {count} pictures are complete.")


@pytest.mark.usefixtures("way")
def test_no_directory_is_left_where_not_one_picture_fits(small_disk: Path) -> None:
    statistics = os.statvfs(small_disk)
    (small_disk / "filler").write_bytes(bytes(statistics.f_bsize * statistics.f_bfree))
    with pytest.raises(OutputError, match=r"the disk is full.*Free some space first\.$"):
        write_frames([noise(3)], small_disk / "frames" / "%d.png", fps=25)
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
@pytest.mark.parametrize("count", [3, 180])  # FFmpeg writes 256 KB at a time: all of it at closing, or some before
@pytest.mark.usefixtures("way")
def test_any_file_size_limit_below_the_videos_is_an_error(tmp_path: Path, suffix: str, count: int) -> None:
    soundfile.write(tmp_path / "a.wav", noise(1).numpy().ravel() / 256 - 0.5, 16000)
    frames = noise(count, width=REPEATABLE_WIDTH)  # of which each video has the same size
    whole = tmp_path / f"whole{suffix}"
    write_frames([frames], whole, fps=25, sound=tmp_path / "a.wav")
    size, before = whole.stat().st_size, listing(tmp_path)
    for limit in [0, 1, 100, size // 3, size * 9 // 10, size - 100, size - 1]:
        with (
            files_limited_to(limit),
            pytest.raises(OutputError, match="could not be written .File too large.*nothing was left"),
        ):
            write_frames([frames], tmp_path / f"a{suffix}", fps=25, sound=tmp_path / "a.wav")
        assert listing(tmp_path) == before
    with files_limited_to(size):
        write_frames([frames], tmp_path / f"a{suffix}", fps=25, sound=tmp_path / "a.wav")
    assert frames_in(tmp_path / f"a{suffix}") == count


@pytest.mark.usefixtures("way")
def test_a_file_size_limit_below_a_pictures_is_an_error(tmp_path: Path) -> None:
    flat = torch.zeros(1, 3, 48, 64, dtype=torch.uint8)
    frames = torch.cat([flat, flat, noise(1), flat])  # the third is the large one
    with files_limited_to(4000), pytest.raises(OutputError, match=r"3\.png could not .*first 2 pictures are complete"):
        write_frames([frames], tmp_path / "%d.png", fps=25)
    assert assert_pictures_complete(tmp_path, frames) == 2


# --- what is no file -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with names here")
@pytest.mark.parametrize("overwrite", [True, False])
def test_pipes_and_devices_are_not_replaced(tmp_path: Path, overwrite: bool) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "null").symlink_to("/dev/null")
    for path in (tmp_path / "pipe", tmp_path / "null", Path("/dev/null")):
        with (
            pytest.raises(OutputError, match="is a pipe or a device, which is not replaced; give a file name"),
            complete_or_absent(path, overwrite),
        ):
            raise AssertionError
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("there", [True, False])
def test_what_a_link_leads_to_is_replaced(tmp_path: Path, there: bool) -> None:
    (tmp_path / "elsewhere").mkdir()
    file, link = tmp_path / "elsewhere" / "file", tmp_path / "link"
    if there:
        file.write_text("old")
    link.symlink_to(file)
    with complete_or_absent(link, overwrite=True) as name:
        Path(name).write_text("new")
    assert (file.read_text(), link.is_symlink()) == ("new", True)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["elsewhere", "file", "link"]
    link.unlink()
    link.symlink_to(tmp_path / "nowhere" / "file")
    with pytest.raises(OutputError, match="nowhere is not a directory"):  # before anything is done for it
        check_output(link, overwrite=True)


@pytest.mark.parametrize("error", [ConnectionResetError(104, "reset"), OSError(28, "full"), torch.OutOfMemoryError()])
def test_an_error_of_whoever_gives_the_frames_is_not_the_outputs(tmp_path: Path, error: Exception) -> None:
    def frames() -> Iterator[torch.Tensor]:
        yield torch.zeros(2, 3, 48, 64, dtype=torch.uint8)
        raise error

    with pytest.raises(type(error)) as raised:
        write_frames(frames(), tmp_path / "a.mp4", fps=25)
    assert raised.value is error
    assert not list(tmp_path.iterdir())


def test_what_gave_frames_is_let_go_after_an_error(tmp_path: Path) -> None:
    """Not by and by: frames on a GPU take its memory until then."""
    refs: list[weakref.ref[torch.Tensor]] = []

    def frames() -> Iterator[torch.Tensor]:
        batch = torch.zeros(2, 3, 48, 64, dtype=torch.uint8)
        refs.append(weakref.ref(batch))
        yield batch
        yield batch
        raise ConnectionResetError

    gc.disable()
    try:
        with suppress(ConnectionResetError):
            write_frames(frames(), tmp_path / "a.mp4", fps=25)
        assert refs[0]() is None
    finally:
        gc.enable()


def test_an_old_directory_is_put_back_where_the_new_one_cannot_be_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "package"
    path.mkdir()
    (path / "mark").write_text("old")
    rename = os.rename

    def renamed(source: Path, target: Path) -> None:
        if target == path and (source / "mark").read_text() == "new":
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", renamed)
    with (
        pytest.raises(OutputError, match="Input/output error"),
        complete_or_absent_directory(path, overwrite=True, mark="mark") as hidden,
    ):
        (hidden / "mark").write_text("new")
    assert (path / "mark").read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_directory_may_be_the_one_that_we_are_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    with complete_or_absent_directory(Path("."), overwrite=False, mark="mark") as hidden:
        (hidden / "mark").write_text("new")
    assert listing(tmp_path) == {"here": None, "here/mark": b"new"}


def test_where_a_directory_cannot_be_made_is_told_by_its_own_name(tmp_path: Path) -> None:
    (tmp_path / ".new").mkdir()
    check_output_directory(tmp_path / "set", overwrite=False, mark="mark", inputs=[])
    with pytest.raises(OutputError, match="none is not a directory, so set cannot be written there"):
        check_output_directory(tmp_path / "none" / "set", overwrite=False, mark="mark", inputs=[])


def test_a_link_that_leads_nowhere_is_there(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    with pytest.raises(OutputError, match="link exists; give --overwrite"):
        write(tmp_path / "link")
    assert not (tmp_path / "file").exists()


def test_a_quota_that_is_used_up_is_a_full_disk() -> None:
    for number in (errno.ENOSPC, errno.EDQUOT):
        assert output_module.describe(Path("a.mp4"), OSError(number, "")).startswith("the disk is full: a.mp4 ")
