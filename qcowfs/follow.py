"""A mount follows its images: what happens to them is noticed, and the tree is made to show it.

Used by mount.py. `Follower.ask` and `Follower.hint` are for any thread; all else runs in trio, with what may block in
worker threads, one at a time. docs/decisions/0011-following.md has the reasons.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from qcowfs import snapshot
from qcowfs._inotify import open_inotify, watch_directory, watch_file
from qcowfs._source import descriptor_of
from qcowfs.errors import QcowfsError
from qcowfs.renewal import known_points, renewed
from qcowfs.source.lock import LocksUnsupported, writer_present

if TYPE_CHECKING:
    import trio

    from qcowfs.chain import Chain, Layer
    from qcowfs.vfs.tree import ChainDisks, Tree

__all__ = ["Follower"]

LOOK_SECONDS = 0.5  # between two looks at images that are written all the time: each takes some 0.1 ms
POLL_SECONDS = 5.0  # the same where nothing is heard: nobody tells of links on the way, of devices, or other machines
REST = 4  # times as long as a reload took is none: who changes 65,536 snapshots all the time gets no more of us
MAX_REST_SECONDS = 60.0
EVENTS_SIZE = 1 << 16  # bytes of inotify events that are taken, and dropped, at once

logger = logging.getLogger("qcowfs.mount")


class Follower:
    """Keeps a tree up to date.

    Args:
        chains: the image, and those that go with it; whoever opened them closes them, after the last read.
        reopen: opens all of them again, without locks.
        tree: shows the first.
        disks: of the tree.
    """

    def __init__(
        self, chains: Sequence[Chain], reopen: Callable[[], list[Chain]], tree: Tree, disks: ChainDisks
    ) -> None:
        self._chains = list(chains)
        self._reopen = reopen
        self._tree = tree
        self._disks = disks
        self._asked = False  # reload, whether something seems to have happened or not
        self._token: trio.lowlevel.TrioToken | None = None  # not None while `run` runs
        self._woken: trio.Event | None = None
        self._told: set[str] = {warning for chain in chains for warning in chain.warnings}
        self._failure = ""  # what was logged last of images that cannot be opened; "": they can

    def ask(self) -> None:
        """Reload soon."""
        self._asked = True
        self.hint()

    def hint(self) -> None:
        """Look soon whether something has happened."""
        import trio

        if self._token is not None:
            with suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self._wake)

    def break_off(self) -> None:
        """Make all reads that wait for a server fail, and all that come: the mount is at its end. Any thread."""
        for chain in self._chains:
            chain.break_off()

    def _wake(self) -> None:
        if self._woken is not None:
            self._woken.set()

    async def run(self, forget: Callable[[Sequence[bytes]], None]) -> None:
        """Follow until cancelled.

        Args:
            forget: makes the kernel forget names in the root; may block.
        """
        import trio

        self._woken = trio.Event()
        self._token = trio.lowlevel.current_trio_token()
        if self._asked:  # before there was anybody to wake
            self._woken.set()
        while True:
            took = 0.0
            try:
                await self._wait_for_change()
                begun = trio.current_time()
                await self._reload(forget)
                took = trio.current_time() - begun
            except Exception:  # the mount lives without it
                logger.exception("internal error")
                self._failure = "internal error"
            await trio.sleep(min(REST * took, MAX_REST_SECONDS))
            with trio.move_on_after(POLL_SECONDS if self._failure else LOOK_SECONDS):
                await self._woken.wait()

    async def _wait_for_change(self) -> None:
        """Wait until the images have to be opened again."""
        import trio

        # In a thread: a path may lie under this very mount.
        descriptor = await trio.to_thread.run_sync(self._watch_all)
        try:
            async with trio.open_nursery() as nursery:
                if descriptor is not None:
                    nursery.start_soon(self._listen, descriptor)
                await self._look_until_changed()
                nursery.cancel_scope.cancel()
        finally:
            if descriptor is not None:
                os.close(descriptor)

    async def _look_until_changed(self) -> None:
        import trio

        # The first look is for what happened while nothing was watched.
        while not (self._asked or await trio.to_thread.run_sync(self._has_changed, abandon_on_cancel=True)):
            await trio.sleep(LOOK_SECONDS)
            assert self._woken is not None
            with trio.move_on_after(POLL_SECONDS):
                await self._woken.wait()
            self._woken = trio.Event()

    async def _listen(self, descriptor: int) -> None:
        """Wake whoever waits when there are events; what they say is of no interest."""
        import trio

        while True:
            await trio.lowlevel.wait_readable(descriptor)
            with suppress(BlockingIOError):
                while len(os.read(descriptor, EVENTS_SIZE)) > EVENTS_SIZE // 2:
                    pass
            self._wake()
            await trio.sleep(LOOK_SECONDS)

    async def _reload(self, forget: Callable[[Sequence[bytes]], None]) -> None:
        import trio

        self._asked, self._woken = False, trio.Event()
        try:
            opened = await trio.to_thread.run_sync(self._opened_again, abandon_on_cancel=True)
        except (QcowfsError, OSError) as error:
            if str(error) != self._failure:
                self._failure = str(error)
                logger.warning("the mount goes on as it is: %s", error)
            return
        self._failure = ""
        if opened is None:
            return
        self._chains, points = opened
        self._disks = self._disks.renewed(self._chains[0], self._chains[1:])
        names = self._tree.follow(points, self._disks)
        await trio.to_thread.run_sync(forget, names, abandon_on_cancel=True)

    def _opened_again(self) -> tuple[list[Chain], tuple[snapshot.Point, ...]] | None:
        """Return the chains and the points as they are now; None if nothing has happened."""
        opened = self._reopen()
        chains = [renewed(old, new) for old, new in zip(self._chains, opened, strict=True)]
        if not any(chains):
            return None
        found = [new or old for old, new in zip(self._chains, chains, strict=True)]
        for chain in found:
            for layer in chain.layers:
                snapshot.require_plain(layer)
            self._tell(chain.warnings)
        return found, known_points(self._tree.points, self._chains[0], found[0])

    def _tell(self, warnings: Sequence[str]) -> None:
        for warning in warnings:
            if warning not in self._told:
                self._told.add(warning)
                logger.warning("%s", warning)

    def _has_changed(self) -> bool:
        return any(_has_changed(layer) for chain in self._chains for layer in chain.layers)

    def _watch_all(self) -> int | None:
        """Return a descriptor that becomes readable when most of what can happen does; None if there is none."""
        try:
            descriptor = open_inotify()
        except OSError:
            return None
        for chain in self._chains:
            for layer in chain.layers:
                _watch(descriptor, layer)
        return descriptor


def _has_changed(layer: Layer) -> bool:
    """Tell at little cost whether something has happened to `layer`."""
    if _leads_elsewhere(layer):
        return True
    if layer.held:  # nobody can write it
        return False
    try:
        return (layer.told or _is_written(layer)) != layer.written_by_other or snapshot.has_moved(layer)
    except (OSError, QcowfsError):
        return True  # opening it again says what is wrong, once


def _leads_elsewhere(layer: Layer) -> bool:
    """Tell whether the path is that of another file by now; not if it is no path, or lies under this very mount."""
    try:
        status = os.stat(layer.path)
    except OSError:
        return False
    identity = (-1, status.st_rdev) if stat.S_ISBLK(status.st_mode) else (status.st_dev, status.st_ino)
    return descriptor_of(layer.source) is not None and identity != layer.file_id


def _is_written(layer: Layer) -> bool:
    descriptors = {descriptor_of(source) for source in (layer.source, layer.data)}
    with suppress(LocksUnsupported):
        return any(writer_present(descriptor) for descriptor in descriptors if descriptor is not None)
    return False


def _watch(descriptor: int, layer: Layer) -> None:
    """Hear of what happens to `layer`, as far as this machine does it, and not past a device's node."""
    own = descriptor_of(layer.source)
    if own is None:
        return
    with suppress(OSError):
        watch_directory(descriptor, os.fsencode(os.path.dirname(layer.path)))
        if not layer.held:
            watch_file(descriptor, b"/proc/self/fd/%d" % own)
