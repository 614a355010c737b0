"""`qcowfs snapshot --quiesce`: the real guest agent in a real guest, which freezes a real file system.

Evidence: a chosen scenario on a real virtual machine. What ext4 has left in the frozen image is the judge: a file
system that was frozen has an empty journal, one that was not has to be recovered.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from qcowfs.qmp.address import Address
from qcowfs.qmp.agent import Agent
from tests.support.mounts import call
from tests.support.qemu import qemu
from tests.support.vm import Machine

pytest.importorskip("qemu.qmp")
pytestmark = pytest.mark.slow

AGENT_PORT = "/dev/vport0p1"
WRITE = "head -c 300000 /dev/urandom >/mnt/{} && sync /mnt/{}"


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with a name that is short enough for sockets."""
    return tmp_path_factory.mktemp("v")


@pytest.fixture
def machine(place: Path) -> Iterator[Machine]:
    """Return a machine whose guest has mounted a file system and runs the agent."""
    disk = place / "disk.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", disk, "64M")
    more = [
        *("-qmp", f"unix:{place}/qmp,server=on,wait=off"),
        *("-chardev", f"socket,id=agent,path={place}/agent,server=on,wait=off", "-device", "virtio-serial-pci"),
        *("-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"),
    ]
    with Machine([disk], directory=place, more=more) as running:
        running.run("mkfs.ext4 -q /dev/vda && mount /dev/vda /mnt && insmod /modules/virtio_console.ko")
        running.run(f"mkdir -p /run && qemu-ga -d -p {AGENT_PORT} -t /run -l /run/log -f /run/pid")
        yield running


def recovered(image: Path) -> dict[str, bool]:
    """Tell of each backing layer's file system whether its journal had to be replayed."""
    document = json.loads(call("list", "-v", "--json", image).stdout)
    layers = [point for point in document["points"] if point["kind"] == "layer"]
    return {point["name"]: point["volumes"][0]["recovery"] is not None for point in layers}


def test_a_quiesced_snapshot_is_clean_and_another_is_not_and_the_guest_goes_on(machine: Machine, place: Path) -> None:
    quiesce = ["--quiesce", "--agent", place / "agent"]
    machine.run(WRITE.format("one", "one"))
    quiesced = call("snapshot", "--qmp", place / "qmp", *quiesce, "disk0", place / "second.qcow2")
    machine.run(WRITE.format("two", "two"))
    plain = call("snapshot", "--qmp", place / "qmp", "disk0", place / "third.qcow2")
    refused = call("snapshot", "--qmp", place / "qmp", *quiesce, "disk0", "/proc/self/fourth.qcow2")
    machine.run(WRITE.format("three", "three"))
    with Agent(Address(path=str(place / "agent"))) as agent:
        after = agent.execute("guest-fsfreeze-status", 10)

    assert (0, 0) == (quiesced.returncode, plain.returncode), quiesced.stderr + plain.stderr
    assert (18, True) == (refused.returncode, "QEMU refuses" in refused.stderr)
    assert "thawed" == after
    assert ["2", "qcow2", "0", str(place / "disk.qcow2")] == plain.stdout.splitlines()[-1].split()
    assert {"disk": False, "second": True} == recovered(place / "third.qcow2")
