"""One point to one file: what is refused, what is written, and what is told of it.

Used by the command line. One thread; copying.py has more of them.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass

from qcowfs import limits
from qcowfs._cache import Cache
from qcowfs.chain import Chain
from qcowfs.errors import QcowfsError, printable
from qcowfs.export.compression import COMPRESSIONS
from qcowfs.export.copying import Copy, Report, Unreadable, Writer, merged
from qcowfs.export.qcow2file import Backing, Qcow2Writer
from qcowfs.export.rawfile import RawWriter
from qcowfs.export.sharing import can_share, still_holds
from qcowfs.export.target import Target, private_mode, require_free
from qcowfs.snapshot import Point, open_disk, require_unchanged

__all__ = ["Form", "Watch", "Written", "export", "require_frozen"]

MIB = 1 << 20
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)

Watch = Callable[[Callable[[], int]], Report | None]  # gets what counts the bytes to come, if somebody wants to know


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """What kind of file is written.

    Attributes:
        format: "raw" or "qcow2".
        compression: a name of COMPRESSIONS, for qcow2; None: as it is.
    """

    format: str
    compression: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A file that is complete; sizes in bytes.

    Attributes:
        file_size, disk_size: its length; what it takes on the host.
        copied: bytes of the disk that were read for it.
    """

    path: str
    form: Form
    virtual_size: int
    file_size: int
    disk_size: int
    copied: int
    backing: Backing | None
    unreadable: list[Unreadable]


def require_frozen(chain: Chain, point: Point) -> None:
    """Refuse a point that somebody is writing.

    Raises:
        QcowfsError: `point` is one.
    """
    if not point.frozen:
        what = "another process is writing this point: its copy would be of no moment at all"
        raise QcowfsError(
            f"{printable(chain.image)}: {what}", hint="export a snapshot instead; qcowfs list shows which points stay"
        )


def export(
    chain: Chain,
    point: Point,
    path: str,
    form: Form,
    *,
    old: Point | None = None,
    backing: Backing | None = None,
    force: bool = False,
    keep_going: bool = False,
    watch: Watch | None = None,
) -> Written:
    """Write `point` to the file `path`, which is there when this returns, and not before.

    Args:
        old, backing: the point that is in the backing file, and how the file names that; None: it stands alone.
        force: replace a file of that name.
        keep_going: write zeros where something cannot be read, instead of failing.

    Raises:
        QcowfsError: it cannot be written, or read.
    """
    for one in (point, old):
        if one is not None:
            require_frozen(chain, one)
    require_free(path, chain, force=force)
    cache = Cache(limits.DEFAULT_CACHE_SIZE)
    disk = open_disk(chain, point, cache)
    before = None if old is None else open_disk(chain, old, cache)
    with Target(path, force=force, mode=private_mode(chain)) as target:
        is_copy = old is None and form.compression is None
        shared = is_copy and not _is_written(chain) and can_share(disk, target.descriptor)
        writer = _writer(target.descriptor, disk.virtual_size, form, backing)
        copy = Copy(disk, before, writer, keep_going=keep_going, shared=shared)
        try:
            copy.run(watch(copy.total) if watch is not None else None)
            writer.finish()
            target.flush()
        except OSError as error:
            raise _cannot_write(path, copy, error) from error
        require_unchanged([one for one in (point, old) if one is not None])
        if shared and not still_holds(disk):
            raise QcowfsError(f"{printable(chain.image)}: another process wrote the image while it was being exported")
        status = os.fstat(target.descriptor)
    return Written(
        path=path,
        form=form,
        virtual_size=disk.virtual_size,
        file_size=status.st_size,
        disk_size=status.st_blocks * 512,
        copied=copy.done,
        backing=backing,
        unreadable=merged(copy.unreadable),
    )


def _is_written(chain: Chain) -> bool:
    """Is a machine running? What shares its blocks with a file makes the next write to them take new ones."""
    return any(layer.written_by_other for layer in chain.layers)


def _writer(descriptor: int, virtual_size: int, form: Form, backing: Backing | None) -> Writer:
    if form.format == "raw":
        return RawWriter(descriptor, virtual_size)
    compress = None if form.compression is None else COMPRESSIONS[form.compression]
    return Qcow2Writer(descriptor, virtual_size, backing=backing, compress=compress, zstd=form.compression == "zstd")


def _cannot_write(path: str, copy: Copy, error: OSError) -> QcowfsError:
    """Zeros and compression may make less of what is left, so that is the most that can be missing."""
    what = f"{printable(path)}: cannot write: {error.strerror}"
    if error.errno in NO_ROOM:
        missing = (copy.total() - copy.done) / MIB
        what += f": up to {missing:.1f} MiB more would be needed; the half file is removed"
    return QcowfsError(what)
