"""The mount as pyfuse3 sees it: an adapter, and the only module that knows FUSE's types. No decision is made here.

Used by mount.py. The trio thread only, but for counting st_blocks, looking into points and whatever concerns the trees
inside, in worker threads. READ comes here only with --no-data-plane, and is synchronous for disks: a warm read takes a
few microseconds, and a trip to a thread and back takes ten times as long.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import stat
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, NoReturn, ParamSpec, TypeVar

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, ReaddirToken, RequestContext, StatvfsData

from qcowfs._core import Disk
from qcowfs._handles import Handles
from qcowfs._mapped import Mapped
from qcowfs.errors import QcowfsError
from qcowfs.vfs.guest import Guest, GuestFile, GuestListing, GuestRoot
from qcowfs.vfs.node import Attributes, Directory, DiskFile, Node, RawFile, Symlink
from qcowfs.vfs.tree import Tree
from qcowfs.vfs.xattrs import CHANGED

__all__ = ["Operations"]

FOREVER = 365 * 86400.0  # seconds; what does not change needs no second look, and umount forgets it
BLOCK_SIZE = 4096  # of statfs, and the preferred size of a read
NAME_MAX = 255
LISTING_SECONDS = 1.0  # that opening a directory waits for what is inside the points; a thousand take less
MAX_LOOKS = 16  # names of points' directories that are looked into at once, all but a few waiting for their source
MAX_ASKING = 2  # threads that ask one tree: it answers one after the other, and may be slow while others are not

logger = logging.getLogger("qcowfs.fuse")

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
Listing = tuple[Directory, tuple[tuple[bytes, Node], ...]]  # what was in it when it was opened


def translated(
    handler: Callable[Parameters, Coroutine[Any, Any, Result]],
) -> Callable[Parameters, Coroutine[Any, Any, Result]]:
    """Turn every failure of `handler` into the errno that FUSE passes on; what nobody expected is logged, and EIO."""

    @functools.wraps(handler)
    async def guarded(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        try:
            return await handler(*args, **kwargs)
        except (FUSEError, trio.Cancelled):
            raise
        except Exception as error:
            raise FUSEError(_errno(error, handler.__name__)) from error

    return guarded


def _errno(error: Exception, where: str) -> int:
    if isinstance(error, (QcowfsError, OSError)):
        return error.errno or errno.EIO
    logger.error("internal error in %s", where, exc_info=error)
    return errno.EIO


class Operations(pyfuse3.Operations):
    """pyfuse3's handlers over a tree.

    Args:
        tree: what is mounted.
        occupied: bytes that the chain's files take on the host, for statfs.
        handles: where open files are entered, for the data plane too.
    """

    def __init__(self, tree: Tree, occupied: int, handles: Handles) -> None:
        super().__init__()
        self._tree = tree
        self._occupied = occupied
        self._handles = handles
        self._opened: dict[int, RawFile | GuestFile] = {}  # by the handle's number
        # Of open directories: the mount's own as they were opened, and those of trees.
        self._listings: dict[int, Listing | GuestListing] = {}
        self._next_listing = 1
        self._looking = trio.CapacityLimiter(MAX_LOOKS)
        self._asking: dict[Guest, trio.CapacityLimiter] = {}
        self._listing = trio.CapacityLimiter(1)
        self._counting = trio.CapacityLimiter(1)  # `DiskFile.count` is for one thread at a time

    # Names and attributes

    @translated
    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        if guest := await self._guest(parent_inode):
            found = await self._ask(guest, guest.lookup, parent_inode, name)
            return _absent() if found is None else _entry(found)
        directory = self._directory(parent_inode)
        folder = self._tree.folder(directory, name)
        if folder is not None and not folder.resolved:
            await trio.to_thread.run_sync(folder.resolve, abandon_on_cancel=True, limiter=self._looking)
        node = self._tree.lookup(directory, name)
        if isinstance(node, GuestRoot) and not await self._ask(node.guest, node.guest.resolve):
            return _absent()
        # Opening and reading must not wait for a walk of tables; who wants st_blocks asks for attributes.
        return _absent(settled=folder is None or folder.known) if node is None else _entry(node.listed())

    @translated
    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        if guest := await self._guest(inode):
            return _entry(await self._ask(guest, guest.attributes, inode))
        return await self._counted(self._node(inode))

    @translated
    async def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        if guest := await self._guest(inode):
            return await self._ask(guest, guest.readlink, inode)
        node = self._node(inode)
        if not isinstance(node, Symlink):
            raise FUSEError(errno.EINVAL)
        return node.target

    @translated
    async def access(self, inode: int, mode: int, ctx: RequestContext) -> bool:
        if mode & os.W_OK:
            raise FUSEError(errno.EROFS)
        if not mode & os.X_OK:
            return True
        guest = await self._guest(inode)
        found = (await self._ask(guest, guest.attributes, inode)).mode if guest else self._node(inode).mode
        # Whoever may look into the mount may look into each directory: that is what it is for.
        return stat.S_ISDIR(found) or bool(found & 0o111)

    @translated
    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        if guest := await self._guest(inode):
            return await self._ask(guest, guest.xattr, inode, name)
        node = self._node(inode)
        if name == CHANGED and isinstance(node, DiskFile):
            changed = await trio.to_thread.run_sync(node.changed, limiter=self._counting)
            value = None if changed is None else b"%d" % changed
        else:
            value = self._tree.xattrs(node).get(name)
        if value is None:
            raise FUSEError(pyfuse3.ENOATTR)
        return value

    @translated
    async def listxattr(self, inode: int, ctx: RequestContext) -> Sequence[bytes]:
        if guest := await self._guest(inode):
            return await self._ask(guest, functools.partial(guest.xattrs, privileged=ctx.uid == 0), inode)
        node = self._node(inode)
        counted = (CHANGED,) if isinstance(node, DiskFile) and node.has_predecessor else ()
        return [*self._tree.xattrs(node), *counted]

    @translated
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        data = StatvfsData()
        data.f_bsize = data.f_frsize = BLOCK_SIZE
        data.f_blocks = -(-self._occupied // BLOCK_SIZE)  # all of them used: what the chain takes on the host
        data.f_files = len(self._tree.root.entries) + 1
        data.f_namemax = NAME_MAX
        return data

    # Directories

    @translated
    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        if guest := await self._guest(inode):
            return self._listed(GuestListing(guest, inode))
        directory = self._directory(inode)
        if not self._tree.resolved(directory):
            await self._resolve(directory)
        return self._listed((directory, tuple(self._tree.entries(directory).items())))

    def _listed(self, listing: Listing | GuestListing) -> int:
        self._listings[self._next_listing] = listing
        self._next_listing += 1
        return self._next_listing - 1

    @translated
    async def readdir(self, fh: int, start_id: int, token: ReaddirToken) -> None:
        listing = self._listings.get(fh)
        if listing is None:  # one that the data plane opened, and has no time for
            listing = GuestListing(*self._handles.directory(fh))
        if isinstance(listing, GuestListing):
            await self._readdir_inside(listing, start_id, token)
            return
        directory, entries = listing
        for place in range(start_id, len(entries)):
            name, node = entries[place]
            if self._tree.lookup(directory, name) is not node:  # gone since; the kernel would remember it for ever
                continue
            # What may turn out to be nothing is looked up again by whoever enters it.
            settled = not isinstance(node, GuestRoot) or node.guest.resolved
            # `ls` alone must not walk the tables of a thousand snapshots; for `ls -l` the kernel asks again.
            if not pyfuse3.readdir_reply(token, name, _entry(node.listed(), settled=settled), place + 1):
                break

    async def _readdir_inside(self, listing: GuestListing, cookie: int, token: ReaddirToken) -> None:
        while entries := await self._ask(listing.guest, listing.after, cookie):
            for entry in entries:
                # Of what is damaged a name is all that is told; who wants more asks, and hears EIO.
                attributes = _entry(entry.attributes, settled=entry.readable)
                if not pyfuse3.readdir_reply(token, entry.name, attributes, entry.cookie):
                    return
                cookie = entry.cookie

    # Bytes

    @translated
    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise FUSEError(errno.EROFS)
        if guest := await self._guest(inode):
            inside = await self._ask(guest, guest.open, inode)
            return self._attached(inside, inside.disk)
        node = self._file(inode)
        return self._attached(node, node.open())

    def _attached(self, file: RawFile | GuestFile, disk: object) -> FileInfo:
        made = isinstance(file, GuestFile) and file.made
        fh = self._handles.attach(disk if isinstance(disk, Disk | Mapped) else None, file, made)
        self._opened[fh] = file
        return FileInfo(fh=fh, direct_io=file.live, keep_cache=not file.live)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        file = self._opened[fh]
        try:  # not @translated: one more coroutine on the hot path
            if isinstance(file, GuestFile) and file.made:
                return await self._ask(file.guest, file.read, off, size)
            return file.read(off, size)
        except Exception as error:
            raise FUSEError(_errno(error, "read")) from error

    @translated
    async def release(self, fh: int) -> None:
        self._handles.detach(fh)
        self._opened.pop(fh).release()

    async def flush(self, fh: int) -> None:
        """Nothing is ever dirty."""

    async def fsync(self, fh: int, datasync: bool) -> None:
        """Nothing is ever dirty."""

    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        """Nothing is ever dirty."""

    async def releasedir(self, fh: int) -> None:
        """Forget the listing."""
        self._listings.pop(fh, None)

    # Writing: the mount is read-only for the kernel too, but a remount could tell it otherwise.

    async def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise FUSEError(errno.EROFS)

    setattr = mknod = mkdir = create = symlink = link = _refuse
    unlink = rmdir = rename = write = setxattr = removexattr = _refuse

    # Helpers

    def _node(self, inode: int) -> Node:
        try:
            return self._tree.node(inode)
        except KeyError:  # a point that is gone: the kernel looks the path up again
            raise FUSEError(errno.ESTALE) from None

    def _directory(self, inode: int) -> Directory:
        node = self._node(inode)
        if not isinstance(node, Directory):
            raise FUSEError(errno.ENOTDIR)
        return node

    def _file(self, inode: int) -> RawFile:
        node = self._node(inode)
        if not isinstance(node, RawFile):
            raise FUSEError(errno.EISDIR if isinstance(node, Directory) else errno.EINVAL)
        return node

    async def _guest(self, inode: int) -> Guest | None:
        """Return the tree that an inode is in, opened; None if the inode is the mount's own."""
        guest = self._tree.guest(inode)
        if guest is not None and not guest.resolved:
            await self._ask(guest, guest.resolve)
        if guest is not None and guest.attributes_of_root is None:
            raise FUSEError(errno.ENOENT)
        return guest

    async def _ask(self, guest: Guest, question: Callable[..., Result], *args: Any) -> Result:
        """Return what a tree answers; it may have to wait for its worker and its source."""
        limiter = self._asking.setdefault(guest, trio.CapacityLimiter(MAX_ASKING))
        return await trio.to_thread.run_sync(question, *args, abandon_on_cancel=True, limiter=limiter)

    async def _resolve(self, directory: Directory) -> None:
        """Find out what is in a directory; a source that does not answer must not keep anybody from listing it."""
        resolve = functools.partial(self._tree.resolve, directory)
        with trio.move_on_after(LISTING_SECONDS) as scope:
            await trio.to_thread.run_sync(resolve, abandon_on_cancel=True, limiter=self._listing)
        if scope.cancelled_caught:
            logger.debug("what is inside the points is not known yet: a listing lacks their directories")

    async def _counted(self, node: Node) -> EntryAttributes:
        if isinstance(node, DiskFile) and not node.counted:
            await trio.to_thread.run_sync(node.count, limiter=self._counting)
        return _entry(node.attributes())


def _entry(attributes: Attributes, *, settled: bool = True) -> EntryAttributes:
    """Return what FUSE says of a node; if not `settled`, the kernel looks the name up again before it believes it."""
    entry = EntryAttributes()
    entry.st_ino = attributes.ino
    entry.st_mode = attributes.mode
    entry.st_nlink = attributes.nlink
    entry.st_uid = attributes.uid
    entry.st_gid = attributes.gid
    entry.st_rdev = attributes.rdev
    entry.st_size = attributes.size
    entry.st_blocks = attributes.blocks
    entry.st_blksize = BLOCK_SIZE
    entry.st_atime_ns = attributes.atime_ns
    entry.st_mtime_ns = attributes.mtime_ns
    entry.st_ctime_ns = attributes.ctime_ns
    entry.attr_timeout = FOREVER if attributes.lasting and settled else 0
    entry.entry_timeout = FOREVER if settled else 0
    return entry


def _absent(*, settled: bool = True) -> EntryAttributes:
    """Return the answer that there is no such name, and lets the kernel remember it if it is `settled`."""
    entry = EntryAttributes()
    entry.st_ino = 0
    entry.entry_timeout = FOREVER if settled else 0
    return entry
