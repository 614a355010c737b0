"""What becomes qemu-nbd: a process that dies with the thread which started it, however that ends.

Run as a program by childsource, in a process of its own: what has to happen between fork and exec must not happen in a
copy of a process of many threads.

    python -m qcowfs.source.launch PARENT LISTENER IMAGE PROGRAM ARGUMENT...

PARENT is the process that started it, LISTENER the descriptor of a socket that listens, IMAGE that of a file or -1. In
the arguments, IMAGE_NUMBER stands for the number that the image's descriptor has in the program. With an image the
program can open no other file, where the kernel has Landlock.
"""

from __future__ import annotations

import fcntl
import os
import sys

from qcowfs import _sandbox

__all__ = ["IMAGE_NUMBER", "main"]

IMAGE_NUMBER = "@image@"
# What a program needs to start, on any system: itself, libraries, and QEMU's modules.
PLACES = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/nix/store", "/gnu/store", "/etc/ld.so.cache", "/dev/urandom")
FIRST = 3  # systemd's protocol: the first descriptor that a service gets


def main(words: list[str]) -> None:
    """Become the program."""
    parent, listener, image = (int(word) for word in words[:3])
    _sandbox.die_with_parent(b"qemu-nbd")
    if os.getppid() != parent:
        return  # it ended before the kernel was told
    if image >= 0:
        _see_only(words[3], image)
        image = fcntl.fcntl(image, fcntl.F_DUPFD, FIRST + 1)
        os.set_inheritable(image, True)
    if listener != FIRST:
        os.dup2(listener, FIRST)
    os.set_inheritable(FIRST, True)
    os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
    program, *arguments = (word.replace(IMAGE_NUMBER, str(image)) for word in words[3:])
    os.execv(program, [program, *arguments])


def _see_only(program: str, image: int) -> None:
    """Leave nothing of the file system to be opened but the image: what it names is none of QEMU's business."""
    own = os.path.dirname(os.path.dirname(os.path.realpath(program)))
    places = {place for place in (*PLACES, own) if place != "/" and os.path.exists(place)}
    _sandbox.see_only([image, *(os.open(place, os.O_PATH | os.O_CLOEXEC) for place in places)])


if __name__ == "__main__":
    main(sys.argv[1:])
