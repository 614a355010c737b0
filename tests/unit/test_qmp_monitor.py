"""A monitor's words: addresses, and servers that are none, that lie, or that never end. Each failure is one line."""

from __future__ import annotations

import json
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from qcowfs import limits
from qcowfs.errors import MonitorError, UsageError
from qcowfs.qmp.address import Address, connect, parse_address
from qcowfs.qmp.devices import devices, find_device
from qcowfs.qmp.monitor import Monitor
from tests.support.monitors import GREETING, server

pytest.importorskip("qemu.qmp")

SECONDS = 0.3  # that a test waits for what never comes
IMAGE = {"filename": "/d/top.qcow2", "format": "qcow2", "virtual-size": 1024}


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a name for a socket that is short enough."""
    return tmp_path_factory.mktemp("v") / "s"


@pytest.mark.parametrize(
    ("text", "address", "device"),
    [
        ("{s}", Address(path="{s}"), None),
        ("{s}:drive0", Address(path="{s}"), "drive0"),
        ("{s}:/machine/peripheral/d:0", Address(path="{s}"), "/machine/peripheral/d:0"),
        ("{s}:", Address(path="{s}"), None),
        ("{s}:with:colon", Address(path="{s}:with"), "colon"),
        ("localhost:4444", Address(host="localhost", port=4444), None),
        ("localhost:4444:drive0", Address(host="localhost", port=4444), "drive0"),
        ("[::1]:4444:#block1", Address(host="::1", port=4444), "#block1"),
        ("/no/such/socket:drive0", Address(path="/no/such/socket"), "drive0"),
    ],
)
def test_an_address_is_a_socket_or_host_and_port_and_what_follows_is_the_device(
    place: Path, text: str, address: Address, device: str | None
) -> None:
    for name in (place, Path(f"{place}:with")):
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(name))
            if name == place and "with" not in text:
                break
    expected = Address(path=address.path.format(s=place), host=address.host, port=address.port)

    assert (expected, device) == parse_address(text.format(s=place), device=True)


@pytest.mark.parametrize("text", ["", "localhost:65536"])
def test_what_is_no_address_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError):
        parse_address(text, device=True)


def answering(*answers: Any) -> Callable[[socket.socket], None]:
    """Return a server that greets, and answers the capabilities and then one command after the other."""

    def serve(connection: socket.socket) -> None:
        connection.sendall(GREETING)
        for answer in ({}, *answers):
            asked = connection.recv(65536)
            if not asked:
                return
            command = json.loads(asked)  # the library ends it with no line break
            named = {"id": command["id"]} if "id" in command else {}
            sent = answer if isinstance(answer, bytes) else json.dumps({"return": answer} | named).encode()
            connection.sendall(sent + b"\r\n")
        while connection.recv(65536):
            pass

    return serve


def failure(place: Path, serve: Callable[[socket.socket], object]) -> str:
    """Return what is said of a server's answer to query-block."""
    address = Address(path=str(place))
    with server(place, serve), pytest.raises(MonitorError) as caught, Monitor(address, seconds=SECONDS) as monitor:
        devices(monitor)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{place}: ")


def test_a_monitor_that_somebody_else_holds_is_told_in_one_line(place: Path) -> None:
    """QEMU accepts one client at a time: the others are connected, and nobody greets them."""
    said = failure(place, lambda connection: connection.recv(1))

    assert "another program (libvirt?) holds this monitor, or it is none: no greeting comes" == said


@pytest.mark.parametrize(
    ("sent", "told"),
    [
        (b"220 mail.example.com ESMTP\r\n", "what is there does not speak as a monitor does: "),
        (b"[1, 2]\n", "what is there does not speak as a monitor does: "),
        (b'{"return": 1}\n', "what is there does not speak as a monitor does: "),
        (b'{"QMP": 7}\n', "what is there does not speak as a monitor does: "),
        (b"", "what is there does not speak as a monitor does: "),
        (b"[" * 100_000 + b"\n", "the connection is gone: "),
        (b"\xff\xfe\n", "the connection is gone: "),
    ],
)
def test_a_server_that_is_no_monitor_is_told_in_one_line(place: Path, sent: bytes, told: str) -> None:
    said = failure(place, lambda connection: connection.sendall(sent))

    assert said.startswith((told, "what is there does not speak as a monitor does: "))


def test_an_answer_that_does_not_end_is_not_held(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_MONITOR_MESSAGE", 1 << 16)

    said = failure(place, answering(b'{"return": "' + b"x" * (1 << 20)))

    assert said.startswith("the connection is gone: ")


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (b"", "the connection is gone: "),
        (b"}", "the connection is gone: "),
        (
            b'{"error": {"class": "GenericError", "desc": "not today\\n"}, "id": "__qmp#00000"}',
            "QEMU refuses: not today",
        ),
        (b'{"error": 7, "id": "__qmp#00000"}', "the connection is gone: "),
        (b'{"return": ' + b"[" * 100_000, "the connection is gone: "),
        (b'{"return": [], "id": []}', "the connection is gone: "),
        (b'{"event": {}, "data": {}}', "the connection is gone: "),
        (7, "what it answers is not what QEMU answers: query-block gives no list of objects"),
        ([7], "what it answers is not what QEMU answers: query-block gives no list of objects"),
        ([{}] * (limits.MAX_DEVICES + 1), "what it answers is not what QEMU answers: query-block gives 4097 of them"),
        ([{"inserted": 7}], "what it answers is not what QEMU answers: inserted is no object"),
        ([{"inserted": {"image": []}}], "what it answers is not what QEMU answers: image is no object"),
        ([{"device": 7, "inserted": {"image": IMAGE}}], "what it answers is not what QEMU answers: device is no text"),
        (
            [{"device": "\ud800", "inserted": {"image": IMAGE}}],
            "what it answers is not what QEMU answers: device is no",
        ),
        (
            [{"inserted": {"image": IMAGE | {"filename": "a\0b"}}}],
            "what it answers is not what QEMU answers: filename is no text",
        ),
        (
            [{"qdev": "x" * (limits.MAX_MONITOR_TEXT + 1), "inserted": {"image": IMAGE}}],
            "what it answers is not what QEMU answers: qdev has 8193 characters, at most 8192 are taken",
        ),
        (
            [{"inserted": {"image": IMAGE | {"virtual-size": "1"}}}],
            "what it answers is not what QEMU answers: virtual-size is no number",
        ),
        (
            [{"inserted": {"image": IMAGE | {"snapshots": [7]}}}],
            "what it answers is not what QEMU answers: a snapshot that is no object",
        ),
        (
            [{"inserted": {"image": IMAGE | {"format": "throttle"}}}],
            "what it answers is not what QEMU answers: a device that has filters only",
        ),
    ],
)
def test_an_answer_that_no_qemu_gives_is_told_in_one_line(place: Path, answer: Any, told: str) -> None:
    assert failure(place, answering(answer)).startswith(told)


def test_a_monitor_that_does_not_answer_a_command_is_not_waited_for(place: Path) -> None:
    assert "QEMU does not answer query-block within 0.3 seconds" == failure(place, answering())


def test_many_events_are_one(place: Path) -> None:
    """They are not kept: a job tells of its states one by one, and a server may have nothing else to say."""
    event = b'{"event": "JOB_STATUS_CHANGE", "data": {}, "timestamp": {"seconds": 1, "microseconds": 1}}\r\n'
    answer = event * 1000 + b'{"return": [], "id": "__qmp#00000"}'

    with server(place, answering(answer)), Monitor(Address(path=str(place)), seconds=10) as monitor:
        assert () == devices(monitor)
        waited = [monitor.wait(SECONDS) for _ in range(2)]

    assert [True, False] == waited


def test_a_chain_without_end_is_refused(place: Path) -> None:
    image: dict[str, Any] = dict(IMAGE)
    for _ in range(2 * limits.MAX_CHAIN_DEPTH):
        image = IMAGE | {"backing-image": image}

    said = failure(place, answering([{"inserted": {"image": image}}]))

    assert said.endswith(f"a chain of more than {limits.MAX_CHAIN_DEPTH} images")


def test_a_node_whose_backing_files_go_round_in_a_circle_has_a_chain_with_an_end(place: Path) -> None:
    node = {"node-name": "n", "drv": "qcow2", "image": IMAGE | {"full-backing-filename": IMAGE["filename"]}}

    with server(place, answering([], [node])), Monitor(Address(path=str(place)), seconds=5) as monitor:
        found = find_device(monitor, "n")

    assert limits.MAX_CHAIN_DEPTH + 1 == len(found.images)


def test_a_device_whose_name_is_empty_is_none(place: Path) -> None:
    """Many a device has no name, or no id: the first of them is not what somebody means who says nothing."""
    answer = [{"device": "", "inserted": {"image": IMAGE}}]

    with (
        server(place, answering(answer)),
        Monitor(Address(path=str(place)), seconds=5) as monitor,
        pytest.raises(UsageError, match="the name of the device is empty"),
    ):
        find_device(monitor, "")


@pytest.mark.parametrize("patience", [0.1, 10])
def test_a_queue_that_is_full_is_waited_for(place: Path, patience: float) -> None:
    """QEMU's has room for one, and several mounts may follow a machine."""
    with socket.socket(socket.AF_UNIX) as listener, ExitStack() as others:
        listener.bind(str(place))
        listener.listen(0)
        others.enter_context(connect(Address(path=str(place)), 1))
        if patience > 1:
            threading.Timer(0.2, lambda: listener.accept()[0].close()).start()
            connect(Address(path=str(place)), patience).close()
        else:
            with pytest.raises(MonitorError, match="too many others wait for it already"):
                connect(Address(path=str(place)), patience)


def test_a_name_that_begins_nowhere_is_a_usage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()

    assert "/s" == parse_address("/s")[0].path
    with pytest.raises(UsageError, match="s: the current directory, where it begins, is gone"):
        parse_address("s")


def test_without_the_library_it_is_said_what_to_install(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "qemu.qmp", None)

    with pytest.raises(MonitorError) as caught:
        Monitor(Address(path=str(place)))

    assert str(caught.value).startswith("--qmp: the library qemu.qmp cannot be imported: ")
    assert "pip install 'qcowfs[qmp]' brings it" == caught.value.hint


def test_a_socket_with_a_long_name_is_reached(tmp_path_factory: pytest.TempPathFactory, place: Path) -> None:
    directory = tmp_path_factory.mktemp("v") / ("long" * 40)
    directory.mkdir()

    with server(place, answering([])):
        (directory / "s").symlink_to(place)
        with Monitor(Address(path=str(directory / "s")), seconds=5) as monitor:
            assert () == devices(monitor)


@pytest.mark.parametrize("name", ["s", "no/such/directory/s"])
def test_a_socket_that_is_not_there_is_told_in_one_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(MonitorError, match="cannot be connected to: No such file or directory"):
        Monitor(Address(path=str(tmp_path / name)))
