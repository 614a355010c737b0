"""Sources: bytes by offset, short only at the end."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from qcowfs._source import FileSource, SliceSource


@pytest.fixture
def source(tmp_path: Path) -> FileSource:
    path = tmp_path / "ten"
    path.write_bytes(b"0123456789")
    return FileSource(os.open(path, os.O_RDONLY), str(path))


@pytest.mark.parametrize(
    ("offset", "length", "expected"),
    [(0, 10, b"0123456789"), (3, 4, b"3456"), (9, 1, b"9"), (9, 2, b"9"), (10, 1, b""), (11, 5, b""), (4, 0, b"")],
)
def test_a_read_is_short_only_at_the_end(source: FileSource, offset: int, length: int, expected: bytes) -> None:
    assert expected == source.read_at(offset, length)


def test_the_size_is_asked_for_each_time(source: FileSource) -> None:
    os.truncate(source.name, 4)

    assert source.size == 4


def test_an_offset_beyond_what_files_can_have_is_an_error_not_a_wrap(source: FileSource) -> None:
    with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
        source.read_at((1 << 64) - 4, 8)


def test_a_closed_source_reads_nothing_and_closes_twice(source: FileSource) -> None:
    source.close()
    source.close()

    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        source.read_at(0, 1)
    with pytest.raises(ValueError, match="closed"):
        source.fileno()


def test_a_directory_is_an_os_error_with_its_name(tmp_path: Path) -> None:
    source = FileSource(os.open(tmp_path, os.O_RDONLY), str(tmp_path))

    with pytest.raises(IsADirectoryError) as caught:
        source.read_at(0, 1)
    assert str(tmp_path) == caught.value.filename


@pytest.mark.parametrize(
    ("offset", "size", "expected"),
    [(0, None, b"0123456789"), (2, 5, b"23456"), (9, 1, b"9"), (10, None, b""), (10, 0, b"")],
)
def test_a_slice_holds_just_its_window(source: FileSource, offset: int, size: int | None, expected: bytes) -> None:
    window = SliceSource(source, offset, size)

    assert len(expected) == window.size
    assert expected == window.read_at(0, 100)


@pytest.mark.parametrize(("offset", "size"), [(11, None), (10, 1), (0, 11), (3, 8), (3, -1)])
def test_a_slice_beyond_its_base_is_refused(source: FileSource, offset: int, size: int | None) -> None:
    with pytest.raises(ValueError, match="within its base"):
        SliceSource(source, offset, size)
