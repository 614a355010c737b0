"""The trees that one process reads: one launcher for all of their workers, and nothing left of them at the end.

Used by the vfs, and by the commands as a context. It has to be made in the main thread, before there are others.
"""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Self

from qcowfs.inside.launcher import Launcher

if TYPE_CHECKING:  # 30 ms, and a mount is ready without them
    from qcowfs._mapped import Mapped
    from qcowfs.inside.client import Tree
    from qcowfs.inside.contents import Item

__all__ = ["Trees", "unreadable"]


def unreadable(item: Item) -> str:
    """Return why `item` has no tree, "" if one can be tried."""
    from qcowfs.inside.readers import available

    if item.volume.trouble:
        return item.volume.trouble
    if item.filesystem is None:
        return "nothing known is on it"
    why = available(item.filesystem.kind)
    return item.filesystem.trouble or (why and f"{item.filesystem.kind} cannot be read here: {why}")


class Trees:
    """A launcher, and the trees whose workers it has.

    Args:
        recover: replay journals in memory, as the guest's next boot would.
    """

    def __init__(self, *, recover: bool) -> None:
        self._recover = recover
        self._launcher = Launcher()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all workers."""
        self._launcher.close()

    def idle(self, seconds: float) -> None:
        """End the workers that nobody asked anything for so long."""
        self._launcher.idle(seconds)

    def tree(self, name: str, item: Item, volume: Mapped) -> Tree:
        """Return the tree of an item that is not `unreadable`. Its worker starts when something is asked.

        Args:
            name: for messages.
            volume: the bytes of `item.volume`.
        """
        from qcowfs.inside.client import Tree

        assert item.filesystem is not None
        return Tree(self._launcher, name, item.filesystem.kind, volume.virtual_size, volume.pread, self._recover)
