"""Which reader a kind of file system has. Used by worker.py, which opens them, and by `list`, which says what lacks.

Readers are imported only when one is opened, and only in a worker: they may need libraries that are not installed.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from qcowfs.inside.reader import Device, Reader, Unreadable

__all__ = ["READERS", "available", "import_reader", "open_reader"]

LIBEXT2FS = "qcowfs was built without libext2fs; install it and its headers (Debian: libext2fs-dev), then qcowfs again"
EXT = ("qcowfs.inside.ext", "qcowfs._ext2", LIBEXT2FS)
REINSTALL = "reinstall qcowfs"

# Kind of file system: the module, what the module itself needs, and what to do where that is not installed.
READERS = {
    "ext2": EXT,
    "ext3": EXT,
    "ext4": EXT,
    "vfat": ("qcowfs.inside.fat", "", REINSTALL),
    "exfat": ("qcowfs.inside.exfat", "", REINSTALL),
    "ntfs": ("qcowfs.inside.ntfs", "", REINSTALL),
}


def available(kind: str) -> str:
    """Return "" if trees of this kind can be read here, otherwise why not. Imports no reader."""
    if kind not in READERS:
        return f"no reader for {kind}"
    module, needed, advice = READERS[kind]
    found = all(importlib.util.find_spec(name) is not None for name in (module, needed) if name)
    return "" if found else advice


def import_reader(kind: str) -> ModuleType:
    """Import the reader of `kind`; its `open_reader` takes a Device and `recover`.

    Raises:
        Unreadable: there is none, or it cannot be imported; the text says what to install.
    """
    if kind not in READERS:
        raise Unreadable(f"no reader for {kind}")
    module, _needed, advice = READERS[kind]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Unreadable(f"{advice} ({error.name or error})") from error


def open_reader(kind: str, device: Device, *, recover: bool) -> Reader:
    """Open the tree on `device`.

    Args:
        recover: replay the journal in memory, as the guest's next boot would.

    Raises:
        Unreadable: it cannot be shown as a tree, or no reader is installed.
        OSError: the volume cannot be read.
    """
    reader: Reader = import_reader(kind).open_reader(device, recover=recover)
    return reader
