"""Readers that keep a mount busy: `python -m tests.support.load DIRECTORY SEED` reads and seeks until it is killed.

It reads past the page cache, so that every read is a request. It ends with 0 when standard input is closed, with 3
when the mount is gone (what it was told then is on standard output), and never with wrong bytes unseen: with
`--like FILE` every read is compared with that file.
"""

from __future__ import annotations

import argparse
import errno
import faulthandler
import mmap
import os
import random
import select
import signal
import sys
from collections.abc import Sequence

GONE = {errno.ENOTCONN, errno.ECONNABORTED, errno.ENODEV, errno.ENOENT, errno.EIO}
LENGTHS = (4096, 16384, 65536, 1 << 20)
TIMEOUT = 60  # seconds after which a reader that hangs shows where, and ends


def main(argv: Sequence[str] | None = None) -> int:
    """Read until told to stop."""
    parser = argparse.ArgumentParser()
    parser.add_argument("directory")
    parser.add_argument("seed", type=int)
    parser.add_argument("--name", default="current.raw")
    parser.add_argument("--like")
    parser.add_argument("--reopen", action="store_true", help="open the file anew for each read")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # what a shell runs in the background ignores it
    faulthandler.dump_traceback_later(TIMEOUT, exit=True)
    expected = open(args.like, "rb").read() if args.like else None  # noqa: SIM115
    try:
        _read(f"{args.directory}/{args.name}", random.Random(args.seed), expected, args.reopen)
    except OSError as error:
        print(errno.errorcode[error.errno or 0], flush=True)
        return 3 if error.errno in GONE else 1
    return 0


def _read(path: str, dice: random.Random, expected: bytes | None, reopen: bool) -> None:
    buffer = memoryview(mmap.mmap(-1, max(LENGTHS)))  # aligned to a page, as O_DIRECT wants it
    file = os.open(path, os.O_RDONLY | os.O_DIRECT)
    size = os.fstat(file).st_size
    print("reading", flush=True)
    while not select.select([0], [], [], 0)[0]:
        for _ in range(20):
            offset = dice.randrange(size // 4096) * 4096
            if dice.random() < 0.2:
                os.lseek(file, offset, os.SEEK_HOLE)
                continue
            length = dice.choice(LENGTHS)
            got = os.preadv(file, [buffer[:length]], offset)
            if expected is not None and buffer[:got] != expected[offset : offset + length]:
                raise AssertionError(f"wrong bytes at {offset}, {length}")
            if reopen:
                os.close(file)
                file = os.open(path, os.O_RDONLY | os.O_DIRECT)


if __name__ == "__main__":
    sys.exit(main())
