"""`qcowfs mount`, and the same under the names by which mount(8) and mount.fuse3 call it.

The verb's words and messages only; the work is in mount.py and daemon.py.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import qcowfs.cli
from qcowfs import daemon, mountoptions, mountpoint, snapshot
from qcowfs.chain import Chain, shown_name
from qcowfs.cli import options as image_options
from qcowfs.errors import FuseUnavailable, UsageError, printable
from qcowfs.follow import Follower
from qcowfs.inside.trees import Trees
from qcowfs.limits import DEFAULT_CACHE_SIZE
from qcowfs.mount import Session, check_fuse, notify_systemd
from qcowfs.mountoptions import MountOptions
from qcowfs.source.url import is_url
from qcowfs.vfs.guest import Presentation
from qcowfs.vfs.names import SUFFIX
from qcowfs.vfs.tree import ChainDisks, Tree

if TYPE_CHECKING:
    from qcowfs.qmp.follower import DeviceFollower

HELP = "show every point in time of an image: its disk as a file, and the files inside"
EXAMPLES = """\
examples:
  qcowfs mount image.qcow2 points
  qcowfs mount --allow-backing /srv/golden image.qcow2 points    its backing file lies there
  qcowfs mount https://images.example.com/image.qcow2 points     an image on a server
  qcowfs mount --qmp /run/vm.qmp                                 which disks a running machine has
  qcowfs mount --qmp /run/vm.qmp:drive0 points                   one of them

'qcowfs umount points' unmounts. See qcowfs-mount(1).
"""

# mount(8), EXIT STATUS
MOUNT_USAGE = 1
MOUNT_SYSTEM = 2
MOUNT_FAILED = 32
MOUNT_CODES = {0: 0, UsageError.exit_code: MOUNT_USAGE, FuseUnavailable.exit_code: MOUNT_SYSTEM}

logger = logging.getLogger("qcowfs.mount")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `qcowfs mount`."""
    parser.add_argument("image", metavar="IMAGE", nargs="?", help="a qcow2 image; qcow version 1 and raw work too")
    image_options.add_opening_options(parser)
    image_options.add_inside_options(parser)
    parser.add_argument("mountpoint", metavar="MOUNTPOINT", nargs="?", help="an empty directory")
    parser.add_argument(
        "--qmp", metavar="SOCKET[:DEVICE]", help="instead of IMAGE: a running machine's disk, by its monitor"
    )
    parser.add_argument("-f", "--foreground", action="store_true", help="stay in the foreground; Ctrl-C unmounts")
    parser.add_argument(
        "-o",
        dest="mount_options",
        metavar="OPT[,OPT...]",
        action="append",
        default=[],
        help=f"mount options: {', '.join(mountoptions.KNOWN)}",
    )
    parser.add_argument("--allow-other", action="store_true", help="let other users read the mount")
    parser.add_argument("--live", action="store_true", help="show what another process is writing, too, as it is now")
    parser.add_argument("--log-file", metavar="FILE", help="log to FILE instead of syslog")
    parser.add_argument(
        "--cache-size",
        metavar="SIZE",
        help=f"memory for tables and decompressed clusters of all points (default {DEFAULT_CACHE_SIZE >> 20}M)",
    )
    parser.add_argument("--no-data-plane", action="store_true", help="answer reads in Python: slower, and no holes")


def run(args: argparse.Namespace) -> int:
    """Mount, and return when the mount is ready; with -f, when it was unmounted."""
    options = mountoptions.parse(args.mount_options)
    if options.rw:
        logger.warning("the mount is read-only, whatever -o rw says")
    return _mount(args, options)


def run_bare(argv: Sequence[str]) -> int:
    """`qcowfs IMAGE MOUNTPOINT -o ...`: what mount.fuse3 runs for `mount -t fuse.qcowfs`, whose options say rw."""
    parser = qcowfs.cli.Parser(prog="qcowfs", usage="qcowfs IMAGE MOUNTPOINT [-o OPT[,OPT...]]", allow_abbrev=False)
    configure(parser)
    for hidden in ("--debug", "--fake", "--sloppy"):
        parser.add_argument(hidden, action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    return _mount(args, mountoptions.parse(args.mount_options, sloppy=args.sloppy), fake=args.fake)


def mount_helper(argv: Sequence[str] | None = None) -> int:
    """mount.qcowfs: what mount(8) runs for `mount -t qcowfs` and for fstab. Returns mount(8)'s exit codes."""
    try:
        called = _helper_parser().parse_args(argv)
    except UsageError as error:
        qcowfs.cli.report(error)
        return MOUNT_USAGE
    # The path is made absolute, so that an image called "list" is not taken for a verb.
    words = [_absolute(called.image), called.mountpoint, *(f"-o{text}" for text in called.mount_options)]
    words += [f"--{word}" for word in ("fake", "sloppy") if getattr(called, word)]
    return MOUNT_CODES.get(qcowfs.cli.main(words), MOUNT_FAILED)


def _helper_parser() -> argparse.ArgumentParser:
    """Return the parser of the arguments that mount(8) documents for its helpers."""
    parser = qcowfs.cli.Parser(prog="mount.qcowfs", description="the helper of mount(8) for type qcowfs")
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument("mountpoint", metavar="MOUNTPOINT")
    parser.add_argument("-o", dest="mount_options", metavar="OPT[,OPT...]", action="append", default=[])
    parser.add_argument("-f", dest="fake", action="store_true", help="check everything, mount nothing")
    parser.add_argument("-s", dest="sloppy", action="store_true", help="ignore unknown mount options")
    parser.add_argument("-n", action="store_true", help="ignored: there is no mtab to write")
    parser.add_argument("-v", action="store_true", help="ignored")
    parser.add_argument("-t", dest="type", help="ignored: the type is known")
    return parser


def _mount(args: argparse.Namespace, options: MountOptions, *, fake: bool = False) -> int:
    """Check everything, then mount. With `fake`, only check."""
    inherited = daemon.inherited_descriptors()
    options = _merged(args, options)
    _sort_words(args, options)
    device = _take_device(args) if args.qmp is not None else None
    if args.mountpoint is None:
        return 0  # the machine's devices were listed
    check_fuse(options)
    directory = mountpoint.check(args.mountpoint, nonempty=options.nonempty)
    log = daemon.log_to_file(options.log_file) if options.log_file else None
    if fake:
        return _serve(args, options, directory, device, lambda session, tree: 0)
    if args.foreground:
        return _serve(args, options, directory, device, partial(_serve_here, args, device, log))
    daemon.run(partial(_serve_behind, args, options, directory, device), close=inherited, log=log)
    return 0


def _serve(
    args: argparse.Namespace,
    options: MountOptions,
    directory: str,
    device: DeviceFollower | None,
    serve: Callable[[Session, Tree], int],
) -> int:
    """Open everything, and call `serve`. Threads of remote sources start here, so this is the process that serves."""
    with ExitStack() as stack:
        trees = stack.enter_context(Trees(recover=not options.norecovery))  # a fork, so before there are threads
        chain = stack.enter_context(image_options.open_chain(args))
        if device is not None:
            _check_device(device, chain)
        others = [stack.enter_context(image_options.open_chain(args, other)) for other in options.others]
        chains, disks = [chain, *others], ChainDisks(chain, options.cache_size, others)
        tree = _tree(chains, disks, options, trees)
        if device is not None and not tree.shown:
            logger.warning("%s: the mount is empty: the disk has no snapshot yet", printable(args.qmp))
        reopen = image_options.reopener(args, chains, None if device is None else _reopener_of(device, args))
        session = Session(
            tree,
            _absolute(chain.image),
            directory,
            options,
            occupied=sum(layer.disk_size for layer in chain.layers),
            obey_hangup=args.foreground,
            follower=Follower(chains, reopen, tree, disks),
            remote=any(opened.remote for opened in chains),
        )
        return serve(session, tree)


def _serve_behind(
    args: argparse.Namespace,
    options: MountOptions,
    directory: str,
    device: DeviceFollower | None,
    tell_parent: Callable[[], None],
) -> int:
    def serve(session: Session, tree: Tree) -> int:
        def ready() -> None:
            _say_mounted(args, tree, f"unmount with: qcowfs umount {printable(args.mountpoint)}")
            tell_parent()

        return _serve_and_follow(session, device, ready)

    return _serve(args, options, directory, device, serve)


def _absolute(image: str) -> str:
    return image if is_url(image) else os.path.abspath(image)


def _sort_words(args: argparse.Namespace, options: MountOptions) -> None:
    """See that the right ones of IMAGE and MOUNTPOINT are there; --qmp stands in the place of IMAGE.

    In fstab it is the other way round: with -o qmp what mount(8) takes for the source is SOCKET:DEVICE.
    """
    if args.qmp is None and options.qmp:
        args.qmp, args.image, args.mountpoint = args.image, args.mountpoint, None
    if args.qmp is None:
        missing = [name for name, word in (("IMAGE", args.image), ("MOUNTPOINT", args.mountpoint)) if word is None]
    elif args.mountpoint is not None:
        raise UsageError("--qmp takes the place of IMAGE: only MOUNTPOINT may follow")
    else:
        args.image, args.mountpoint, missing = None, args.image, []
    if missing:
        what = f"the following arguments are required: {', '.join(missing)}"
        raise UsageError(what, hint="'qcowfs mount --help' tells more")


def _take_device(args: argparse.Namespace) -> DeviceFollower | None:
    """Put the image of a running machine's device into `args`, and return what follows the device.

    If none is named, the devices are listed and it is None.
    """
    from qcowfs.cli import machines  # with asyncio it takes 0.1 s, and no other mount has to wait for it

    files = machines.take_device(args)
    if files is None and args.mountpoint is not None:
        hint = f"one of those: --qmp {shlex.quote(args.qmp)}:DEVICE"
        raise UsageError(f"{printable(args.qmp)}: no device is named, and nothing is mounted", hint=hint)
    if files is not None and args.mountpoint is None:
        raise UsageError("the following arguments are required: MOUNTPOINT", hint="'qcowfs mount --help' tells more")
    return None if files is None else machines.DeviceFollower(files)


def _check_device(device: DeviceFollower, chain: Chain) -> None:
    from qcowfs.qmp.files import require_same

    require_same(device.files, chain)


def _reopener_of(device: DeviceFollower, args: argparse.Namespace) -> Callable[[], Chain]:
    from qcowfs.cli import machines

    return machines.reopener(args, device)


def _serve_and_follow(session: Session, device: DeviceFollower | None, ready: Callable[[], None]) -> int:
    """Serve, and follow the device if there is one: from when the mount is ready on, since then nothing forks."""

    def ready_to_follow() -> None:
        ready()
        if device is not None:
            device.start(lambda files: session.reload())

    try:
        return session.serve(ready_to_follow)
    finally:
        if device is not None:
            device.stop()


def _merged(args: argparse.Namespace, options: MountOptions) -> MountOptions:
    """Bring together what the options and what `-o` said; `args` gets what opening the image needs."""
    args.no_lock = args.no_lock or options.no_lock
    args.allow_backing = [*(args.allow_backing or []), *options.allow_backing]
    for word in ("cache_dir", "cache_dir_size", "image_format", "source_timeout"):
        setattr(args, word, getattr(args, word) or getattr(options, word))
    if args.allow_other and options.allow_root:
        raise UsageError("--allow-other and the mount option allow_root exclude each other")
    return replace(
        options,
        allow_other=args.allow_other or options.allow_other,
        live=args.live or options.live,
        log_file=args.log_file or options.log_file,
        norecovery=args.norecovery or options.norecovery,
        others=(*args.others, *options.others),
        no_data_plane=args.no_data_plane or options.no_data_plane,
        cache_size=options.cache_size if args.cache_size is None else mountoptions.cache_size(args.cache_size),
    )


def _tree(chains: Sequence[Chain], disks: ChainDisks, options: MountOptions, trees: Trees) -> Tree:
    """Return the tree of the first chain; the person hears now what it will not show."""
    chain = chains[0]
    for layer in (layer for opened in chains for layer in opened.layers):
        snapshot.require_plain(layer)
    owner = (os.getuid(), os.getgid())
    points = snapshot.points(chain)
    image, shown = _absolute(chain.image), _presentation(options)
    tree = Tree(points, disks, image=image, owner=owner, live=options.live, presentation=shown)
    tree.guests.start(trees)
    if tree.left_out:
        names = ", ".join(name + SUFFIX for name in tree.left_out[:3])
        more = f" and {len(tree.left_out) - 3} more" if len(tree.left_out) > 3 else ""
        what = "is left out: another process has the image open for writing; --live shows it as it is at each read"
        logger.warning("%s: %s%s %s", printable(chain.image), names, more, what)
    return tree


def _presentation(options: MountOptions) -> Presentation:
    return Presentation(
        uid=options.uid,
        gid=options.gid,
        umask=options.umask,
        recover=not options.norecovery,
        contain=options.symlinks == "contain",
    )


def _serve_here(
    args: argparse.Namespace, device: DeviceFollower | None, log: logging.Handler | None, session: Session, tree: Tree
) -> int:
    if log is not None:
        logging.getLogger("qcowfs").addHandler(log)

    def ready() -> None:
        notify_systemd(f"READY=1\nSTATUS={len(tree.shown)} points of {printable(shown_name(args.image))}")
        _say_mounted(args, tree, "Ctrl-C unmounts it")

    return _serve_and_follow(session, device, ready)


def _say_mounted(args: argparse.Namespace, tree: Tree, how_to_end: str) -> None:
    if sys.stdout is not None and sys.stdout.isatty():  # None: the caller closed descriptor 1
        count = f"{len(tree.shown)} point{'' if len(tree.shown) == 1 else 's'}"
        print(
            f"mounted {printable(shown_name(args.image))} on {printable(args.mountpoint)} ({count}); {how_to_end}",
            flush=True,
        )
