"""A file is written whole or not at all, and nothing else is left behind."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from keybroker.cli.out_file import replaced


def write(path: Path, data: bytes = b"new") -> None:
    with replaced(path) as file:
        file.write(data)


def names(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()]


def test_file_is_written_whole(tmp_path: Path) -> None:
    write(tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"new"
    assert names(tmp_path) == ["out"]


def test_new_file_has_the_mode_that_the_user_wants(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write(tmp_path / "out")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o640


def test_old_file_is_there_until_the_new_one_takes_its_place(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"old")
    with replaced(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("had_one", [True, False])
def test_failure_leaves_what_there_was(tmp_path: Path, had_one: bool) -> None:
    path = tmp_path / "out"
    if had_one:
        path.write_bytes(b"old")

    def fail() -> None:
        with replaced(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert names(tmp_path) == (["out"] if had_one else [])
    if had_one:
        assert path.read_bytes() == b"old"


@pytest.mark.parametrize("place", ["nowhere/out", "file/out", "."])
def test_place_that_cannot_be_written_is_found_out_at_once_and_named(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError) as caught, replaced(tmp_path / place):  # noqa: PT011  which one is the system's to say
        pytest.fail("it was not found out at once")
    assert Path(str(caught.value.filename)) == tmp_path / place


def test_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "dangling").symlink_to("new")
    write(tmp_path / "link")
    write(tmp_path / "dangling")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == (tmp_path / "new").read_bytes() == b"new"


def test_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(path.read_bytes()))
    reader.start()
    write(path)
    reader.join(10)
    assert got == [b"new"]
    assert path.is_fifo()


def test_device_is_written_to_and_not_replaced() -> None:
    write(Path("/dev/null"))
    assert Path("/dev/null").is_char_device()


def test_long_name_is_no_obstacle(tmp_path: Path) -> None:
    write(tmp_path / ("x" * 255))
    assert names(tmp_path) == ["x" * 255]


def test_name_that_is_not_utf8_is_no_obstacle(tmp_path: Path) -> None:
    write(tmp_path / os.fsdecode(b"\xff.sig"))
    assert [os.fsencode(name) for name in names(tmp_path)] == [b"\xff.sig"]
