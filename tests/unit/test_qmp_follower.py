"""Following a device whose monitor talks too much, or of what nobody expects. The machine is this very process."""

from __future__ import annotations

import json
import queue
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from qcowfs.qmp import follower as follower_module
from qcowfs.qmp.address import Address
from qcowfs.qmp.devices import Device, Image
from qcowfs.qmp.files import DeviceFiles
from qcowfs.qmp.follower import DeviceFollower
from tests.support.monitors import GREETING, server

pytest.importorskip("qemu.qmp")

EVENT = b'{"event": "JOB_STATUS_CHANGE", "data": {}, "timestamp": {"seconds": 1, "microseconds": 1}}\r\n'
IMAGE = {"filename": "/no/such/image", "format": "qcow2", "virtual-size": 1024}
ANSWER = [{"device": "d", "inserted": {"image": IMAGE, "node-name": "n"}}]
PATIENCE = 30


class StandIn:
    """A monitor that sends `before` in front of each answer.

    Attributes:
        asked: how often it was asked for the devices.
        ended: connections that are over.
    """

    def __init__(self, before: bytes = b"") -> None:
        self.before = before
        self.asked = 0
        self.ended: queue.Queue[int] = queue.Queue()

    def __call__(self, connection: socket.socket) -> None:
        connection.sendall(GREETING)
        while asked := connection.recv(65536):
            command = json.loads(asked)
            self.asked += command["execute"] == "query-block"
            answer = {"return": ANSWER if command["execute"] == "query-block" else {}}
            named = {"id": command["id"]} if "id" in command else {}
            connection.sendall(self.before * bool(named) + json.dumps(answer | named).encode() + b"\r\n")
        self.ended.put(self.asked)


@pytest.fixture
def followed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], DeviceFollower]:
    monkeypatch.setattr(follower_module, "HOLD_SECONDS", 0.3)
    monkeypatch.setattr(follower_module, "RETRY_SECONDS", 0.01)

    def follow(path: Path) -> DeviceFollower:
        image = Image(name="/no/such/image", format="qcow2", virtual_size=1024)
        device = Device(name="d", qdev="", node="n", images=(image,))
        place = Address(path=str(path))
        files = DeviceFiles(
            address=place, device=device, process=None, path=image.name, format="qcow2", identities=(None,), vouched=()
        )
        return DeviceFollower(files)

    return follow


def test_a_storm_of_events_does_not_become_one_of_looks(
    tmp_path_factory: pytest.TempPathFactory,
    followed: Callable[[Path], DeviceFollower],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = StandIn(EVENT * 100)
    monkeypatch.setattr(DeviceFollower, "_look", lambda self, monitor: monitor.execute("query-block"))
    with server(tmp_path_factory.mktemp("v") / "s", machine) as path:
        follower = followed(path)
        follower.start(lambda files: None)
        looks = machine.ended.get(timeout=PATIENCE)
        follower.stop(PATIENCE)

    assert 1 < looks <= 2 + 0.3 / follower_module.EVENT_SECONDS


@pytest.mark.expect_warnings
def test_what_nobody_expected_does_not_end_the_following(
    tmp_path_factory: pytest.TempPathFactory,
    followed: Callable[[Path], DeviceFollower],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    looked = threading.Semaphore(0)

    def look(self: DeviceFollower) -> None:
        looked.release()
        raise ZeroDivisionError

    monkeypatch.setattr(DeviceFollower, "_look_for_a_while", look)
    follower = followed(tmp_path_factory.mktemp("v") / "s")
    follower.start(lambda files: None)
    assert all(looked.acquire(timeout=PATIENCE) for _ in range(3))
    follower.stop(PATIENCE)

    assert "internal error" in caplog.text
