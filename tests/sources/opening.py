"""Opens a URL as chain does, and says of a read what it was."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from qcowfs._source import Source
from qcowfs.errors import QcowfsError
from qcowfs.source.remote import Remote, RemoteSettings, open_remote
from qcowfs.source.url import parse_url

__all__ = ["error_of", "opened", "refusal"]

PATIENCE = 20.0  # longer than any server here is busy; a test of what fails says how short it is


@contextmanager
def opened(url: str, patience: float = PATIENCE) -> Iterator[Remote]:
    """Open `url` until the end of the block."""
    remote = open_remote(parse_url(url), RemoteSettings(patience=patience))
    try:
        yield remote
    finally:
        remote.source.close()


def refusal(url: str, patience: float = PATIENCE) -> str:
    """Return the one line with which opening `url` fails."""
    with pytest.raises(QcowfsError) as caught, opened(url, patience):
        pass
    message = str(caught.value)

    assert "\n" not in message
    return message


def error_of(source: Source, offset: int = 0, length: int = 10) -> str:
    """Return the name of the errno with which a read fails."""
    with pytest.raises(OSError) as caught:
        source.read_at(offset, length)
    return errno.errorcode[caught.value.errno or 0]
