"""`qcowfs snapshot`: an external snapshot of a running machine's disk."""

from __future__ import annotations

import argparse

from qcowfs.cli import output
from qcowfs.cli.options import add_json_option
from qcowfs.errors import UsageError
from qcowfs.qmp.address import absolute, parse_address

HELP = "take an external snapshot of a running machine's disk, by QMP"
EXAMPLES = """\
FILE becomes the image that the machine writes to. The image that it wrote to so far is not changed any more: it is
FILE's backing file, and holds the disk as it is now. QEMU makes FILE, as the user that it runs as.

examples:
  qcowfs snapshot --qmp /run/vm.qmp drive0 /srv/vm/disk.2.qcow2
  qcowfs snapshot --qmp /run/vm.qmp --quiesce --agent /run/vm.agent drive0 disk.2.qcow2

See qcowfs-snapshot(1).
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `qcowfs snapshot`."""
    parser.add_argument("--qmp", metavar="SOCKET", required=True, help="the monitor: a Unix socket or HOST:PORT")
    parser.add_argument("device", metavar="DEVICE", help="a device's name or id, or the name of the node on top")
    parser.add_argument("file", metavar="FILE", help="the new image; it must not exist")
    parser.add_argument(
        "--quiesce", action="store_true", help="let the guest write out and freeze its file systems meanwhile"
    )
    parser.add_argument("--agent", metavar="SOCKET", help="the socket of the guest agent, for --quiesce")
    add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    """Take the snapshot, and print the chain that the device has then."""
    address, _ = parse_address(args.qmp)
    agent, _ = parse_address(args.agent) if args.agent else (None, None)
    if args.quiesce != (agent is not None):
        raise UsageError("--quiesce and --agent go together: the guest is asked by its agent")
    path = absolute(args.file)  # QEMU's working directory is another one

    from qcowfs.cli import machines  # with asyncio it takes 0.1 s, and `qcowfs --help` imports every verb

    files = machines.take_snapshot(address, args.device, path, agent)
    if args.json:
        output.print_json(machines.chain_document(files))
    else:
        machines.print_chain(files)
    return 0
