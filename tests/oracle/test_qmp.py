"""A running QEMU, asked for its devices' chains and told to take snapshots.

Evidence: own fixtures on a real QEMU, whose machine does not start. It is the judge of what a chain is, and `qemu-img
info` of what a snapshot has recorded.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from qcowfs import chain as chains
from qcowfs import cli
from qcowfs.cli.machines import take_device, take_snapshot
from qcowfs.errors import GateRefused, MonitorError, UnsupportedImage, UsageError, printable
from qcowfs.policy import Policy, load_policy
from qcowfs.qmp import follower as follower_module
from qcowfs.qmp.address import Address, parse_address
from qcowfs.qmp.devices import devices, find_device
from qcowfs.qmp.files import DeviceFiles, locate, require_same
from qcowfs.qmp.follower import DeviceFollower
from qcowfs.qmp.monitor import Monitor
from tests.support import need
from tests.support.monitors import stopped_machine
from tests.support.nbd import qemu_nbd
from tests.support.qemu import qemu

pytest.importorskip("qemu.qmp")
need("qemu-system-x86_64", "qemu-img", "qemu-nbd", "setpriv")

PATIENCE = 30  # seconds


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with images: an overlay with a snapshot on its base elsewhere, and raw disks."""
    path = tmp_path_factory.mktemp("v")
    (path / "far").mkdir()
    qemu("qemu-img", "create", "-q", "-f", "qcow2", path / "far" / "base.qcow2", "1M")
    make_overlay(path / "top.qcow2", path / "far" / "base.qcow2")
    qemu("qemu-img", "snapshot", "-c", "before", path / "top.qcow2")
    for name in ("plain", "locked", "shared", "lonely", "other"):
        qemu("qemu-img", "create", "-q", "-f", "qcow2", path / f"{name}.qcow2", "1M")
    qemu("qemu-img", "create", "-q", "-f", "raw", path / "disk.raw", "1M")
    qemu("qemu-img", "create", "-q", "-f", "vmdk", path / "disk.vmdk", "1M")
    return path


def make_overlay(path: Path, base: Path) -> Path:
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", path)
    return path


@pytest.fixture(scope="module")
def machine(place: Path) -> Iterator[Address]:
    """Return the monitor of a machine with one device of each kind; it does not change them."""
    words = [
        # by -drive, with a relative name
        *("-drive", "if=none,id=drive0,format=qcow2,file=plain.qcow2", "-device", "virtio-blk-pci,drive=drive0"),
        # by -blockdev, named by its device
        *("-blockdev", f"driver=qcow2,node-name=n0,file.driver=file,file.filename={place}/top.qcow2"),
        *("-device", "virtio-blk-pci,drive=n0,id=disk0"),
        # with a filter on top, and no name but the node's
        *("-object", "throttle-group,id=slow", "-blockdev", f"driver=file,node-name=f1,filename={place}/disk.raw"),
        *("-blockdev", "driver=raw,node-name=r1,file=f1"),
        *(
            "-blockdev",
            "driver=throttle,node-name=t1,throttle-group=slow,file=r1",
            "-device",
            "virtio-blk-pci,drive=t1",
        ),
        # whose name QEMU can only write as json:
        *(
            "-drive",
            f"if=none,id=drive2,driver=qcow2,file.driver=file,file.locking=off,file.filename={place}/locked.qcow2",
        ),
        # with another chain than its header says
        *("-blockdev", f"driver=qcow2,node-name=n3,file.driver=file,file.filename={place}/other.qcow2"),
        *("-blockdev", f"driver=qcow2,node-name=n4,file.driver=file,file.filename={place}/lonely.qcow2,backing=n3"),
        *("-device", "virtio-blk-pci,drive=n4,id=disk4"),
        *("-drive", f"if=none,id=drive5,format=vmdk,file={place}/disk.vmdk"),
        *(
            "-drive",
            f"if=none,id=drive6,driver=raw,file.driver=file,file.filename={place}/disk.raw,size=512,read-only=on",
        ),
        *("-drive", "if=none,id=drive7,driver=null-co,read-zeroes=on"),
        *("-drive", f"if=none,id=ro,format=qcow2,readonly=on,file={place}/shared.qcow2"),
    ]
    with stopped_machine(place, *words, cwd=place) as path:
        yield Address(path=str(path))


def located(machine: Address, word: str) -> DeviceFiles:
    with Monitor(machine) as monitor:
        return locate(machine, find_device(monitor, word), monitor.process)


def failure(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, list[str]]:
    code = cli.main([str(word) for word in words])
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return code, said.err.splitlines()


@pytest.mark.parametrize(
    ("words", "top", "image_format", "images"),
    [
        (("drive0",), "plain.qcow2", "qcow2", 1),
        (
            ("disk0", "n0", "/machine/peripheral/disk0", "/machine/peripheral/disk0/virtio-backend"),
            "top.qcow2",
            "qcow2",
            2,
        ),
        (("t1", "/machine/peripheral-anon/device[1]"), "disk.raw", "raw", 1),
        (("drive2",), "locked.qcow2", "qcow2", 1),
        (("r1",), "disk.raw", "raw", 1),
    ],
)
def test_a_device_is_found_by_its_name_its_id_its_place_and_its_node(
    machine: Address, place: Path, words: tuple[str, ...], top: str, image_format: str, images: int
) -> None:
    for word in words:
        found = located(machine, word)

        assert (str(place / top), image_format) == (found.path, found.format)
        assert images == len(found.device.images) == len(found.vouched)


def test_a_node_below_a_device_has_its_own_chain(machine: Address, place: Path) -> None:
    with Monitor(machine) as monitor:
        nodes = monitor.execute("query-named-block-nodes", flat=True)
        nodes = {node["image"]["filename"]: node for node in nodes if node["drv"] == "qcow2"}
        base = find_device(monitor, nodes[str(place / "far" / "base.qcow2")]["node-name"])
        top = find_device(monitor, nodes[str(place / "top.qcow2")]["node-name"])

    assert [str(place / "far" / "base.qcow2")] == [image.name for image in base.images]
    assert [str(place / "top.qcow2"), str(place / "far" / "base.qcow2")] == [image.name for image in top.images]


def test_the_snapshots_of_an_image_are_told(machine: Address) -> None:
    (snapshot,) = located(machine, "disk0").device.images[0].snapshots

    assert ("1", "before") == snapshot[:2]


def test_the_devices_are_listed_where_none_is_named(machine: Address, capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.main(["mount", "--qmp", machine.path])
    heading, *rows = capsys.readouterr().out.splitlines()

    assert (0, "DEVICE") == (code, heading.split()[0])
    with Monitor(machine) as monitor:
        assert [device.word for device in devices(monitor)] == [row.split()[0] for row in rows]
    assert {"drive0", "disk0", "disk4"} <= {row.split()[0] for row in rows}


def test_a_mount_without_a_device_is_an_error_beside_the_list(
    machine: Address, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, lines = failure(capsys, "mount", "--qmp", machine.path, tmp_path)

    assert UsageError.exit_code == code
    assert f"qcowfs: {machine.path}: no device is named, and nothing is mounted" == lines[0]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["IMAGE", "MNT"], "--qmp takes the place of IMAGE: only MOUNTPOINT may follow"),
        ([], "the following arguments are required: MOUNTPOINT"),
    ],
)
def test_the_mount_point_is_all_that_may_follow(
    machine: Address, capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    code, lines = failure(capsys, "mount", "--qmp", f"{machine.path}:disk0", *words)

    assert UsageError.exit_code == code
    assert f"qcowfs: {told}" == lines[0]


def test_a_device_that_is_not_there_is_an_error_with_those_that_are(
    machine: Address, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, lines = failure(capsys, "mount", "--qmp", f"{machine.path}:nix", tmp_path)

    assert UsageError.exit_code == code
    assert f"qcowfs: {machine.path}: nix is none of its devices, and no node of an image" == lines[0]
    assert "drive0" in lines[1]


def test_the_node_of_a_file_is_no_disk(machine: Address) -> None:
    """Its bytes are those of the image: with a header and tables, and not as the guest sees them."""
    with pytest.raises(UsageError, match="f1 is none of its devices, and no node of an image"):
        located(machine, "f1")


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("drive6", "a window of a file is not supported"),
        ("drive7", "QEMU reads it as null-co"),
    ],
)
def test_what_qcowfs_cannot_read_is_told(machine: Address, word: str, told: str) -> None:
    with pytest.raises(UnsupportedImage, match=told):
        located(machine, word)


def test_files_that_qemu_has_open_may_be_named_by_the_images(
    place: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The base lies where no image vouches for it. The machine has it open, so it may be."""
    base = tmp_path / "base.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", base, "1M")
    directory = tmp_path_factory.mktemp("v")
    top = make_overlay(directory / "top.qcow2", base)
    with stopped_machine(directory, "-drive", f"if=none,id=d,format=qcow2,file={top}") as path:
        files = located(Address(path=str(path)), "d")

        with pytest.raises(GateRefused):
            chains.open_chain(str(top), Policy())
        with chains.open_chain(files.path, Policy(allow=files.vouched), image_format=files.format) as opened:
            require_same(files, opened)

    assert (str(top), str(base)) == files.vouched


def test_a_file_that_qemu_does_not_have_open_is_refused(place: Path, machine: Address) -> None:
    """As from within another mount namespace: the name leads to another file here."""
    with Monitor(machine) as monitor:
        device = find_device(monitor, "disk0")
        other = replace(device, images=(replace(device.images[0], name=str(place / "other-than-open")),))
        (place / "other-than-open").write_bytes(b"")

        with pytest.raises(MonitorError, match="leads to another file here"):
            locate(machine, other, monitor.process)


def test_of_files_that_nobody_bears_out_none_is_vouched_for(place: Path, machine: Address) -> None:
    """By TCP, or for a QEMU of another user: nobody can tell which files it has open, nor where it runs."""
    with Monitor(machine) as monitor:
        found = locate(machine, find_device(monitor, "disk0"), None)
        relative = find_device(monitor, "drive0")

    assert (str(place / "top.qcow2"), ()) == (found.path, found.vouched)
    with pytest.raises(MonitorError, match="where that begins cannot be told from here"):
        locate(machine, relative, None)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("/dev/fdset/2", "an open file without a name"),
        ("/no/such/file", "leads nowhere here: /no/such/file: No such file or directory"),
        ("vxhs://localhost/x", r"it is no file here \(vxhs\)"),
        ("json:{", "QEMU's name for the image: "),
        ('json:{"driver":"qcow2","file":{"driver":"nbd","filename":"/x"}}', "it is no file here"),
    ],
)
def test_a_name_that_leads_nowhere_is_told(machine: Address, name: str, told: str) -> None:
    with Monitor(machine) as monitor:
        device = find_device(monitor, "disk0")
    named = replace(device, images=(replace(device.images[0], name=name),))

    with pytest.raises((MonitorError, UnsupportedImage), match=told):
        locate(machine, named, None)


def test_another_chain_than_the_headers_say_is_refused(machine: Address) -> None:
    """The guest reads what was put together on QEMU's command line, and the header says nothing of it."""
    files = located(machine, "disk4")

    with chains.open_chain(files.path, Policy(), image_format=files.format) as opened:
        assert 1 == len(opened.layers)
        with pytest.raises(MonitorError, match="2 images, not 1"):
            require_same(files, opened)


@pytest.mark.parametrize(
    ("file", "device", "told"),
    [
        ("top.qcow2", "disk0", "{}: there is such a file already, and it is not overwritten"),
        ("link", "disk0", "{}: there is such a file already, and it is not overwritten"),
        ("no/such/o.qcow2", "disk0", "{}: there is no directory "),
        ("far/o.qcow2", "drive0", "{}: QEMU calls the image plain.qcow2, which would lead nowhere from "),
        ("o.qcow2", "t1", "a filter, throttle, lies on top of the image of "),
        ("o.qcow2", "ro", "ro: QEMU has it open for reading only"),
        ("o.qcow2", "", "the name of the device is empty"),
        (os.fsdecode(b"o\xff.qcow2"), "drive0", "{}: QMP can say only names that are UTF-8"),
    ],
)
def test_a_snapshot_that_would_go_wrong_is_refused_and_nothing_is_done(
    machine: Address, place: Path, capsys: pytest.CaptureFixture[str], file: str, device: str, told: str
) -> None:
    (place / "link").unlink(missing_ok=True)
    (place / "link").symlink_to("nowhere")
    before = located(machine, "disk0"), sorted(place.rglob("*"))

    code, lines = failure(capsys, "snapshot", "--qmp", machine.path, device, place / file)

    assert UsageError.exit_code == code
    assert lines[0].startswith(f"qcowfs: {told.format(printable(str(place / file)))}")
    assert before == (located(machine, "disk0"), sorted(place.rglob("*")))


@pytest.mark.parametrize("words", [["--quiesce"], ["--agent", "/no/such/agent"]])
def test_quiesce_and_agent_go_together(machine: Address, capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    code, lines = failure(capsys, "snapshot", "--qmp", machine.path, *words, "disk0", "new.qcow2")

    assert (UsageError.exit_code, True) == (code, lines[0].startswith("qcowfs: --quiesce and --agent go together"))


def test_without_an_agent_that_answers_quiesce_is_an_error_and_nothing_is_done(
    machine: Address, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = place / "quiesced.qcow2"

    code, lines = failure(
        capsys, "snapshot", "--qmp", machine.path, "--quiesce", "--agent", "/no/such/agent", "disk0", new
    )

    assert MonitorError.exit_code == code
    assert "qcowfs: /no/such/agent: cannot be connected to: No such file or directory" == lines[0]
    assert not new.exists()


@pytest.fixture
def changing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Address]:
    """Return the monitor of a machine that tests may change: `drive0` by -drive, `disk1` by -blockdev, `raw` raw."""
    path = tmp_path_factory.mktemp("v")
    for name in ("a", "b"):
        qemu("qemu-img", "create", "-q", "-f", "qcow2", path / f"{name}.qcow2", "1M")
    qemu("qemu-img", "create", "-q", "-f", "raw", path / "disk.raw", "1M")
    words = [
        *("-drive", "if=none,id=drive0,format=qcow2,file=a.qcow2", "-device", "virtio-blk-pci,drive=drive0"),
        *("-blockdev", f"driver=qcow2,node-name=n1,file.driver=file,file.filename={path}/b.qcow2"),
        *("-device", "virtio-blk-pci,drive=n1,id=disk1"),
        *("-drive", f"if=none,id=raw,format=raw,file={path}/disk.raw", "-device", "virtio-blk-pci,drive=raw"),
    ]
    with stopped_machine(path, *words, cwd=path) as monitor:
        yield Address(path=str(monitor))


@pytest.mark.parametrize(
    ("device", "base", "base_format"),
    [("drive0", "a.qcow2", "qcow2"), ("disk1", "b.qcow2", "qcow2"), ("raw", "disk.raw", "raw")],
)
def test_a_snapshot_records_its_backing_file_with_its_format_and_prints_the_chain(
    changing: Address,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    base: str,
    base_format: str,
) -> None:
    """A relative FILE begins where we are, not where QEMU is."""
    directory = Path(changing.path).parent
    monkeypatch.chdir(directory)

    code = cli.main(["snapshot", "--qmp", "qmp", device, "new.qcow2"])
    said = capsys.readouterr()
    assert (0, "") == (code, said.err)
    rows = [row.split() for row in said.out.splitlines()]
    recorded = json.loads(qemu("qemu-img", "info", "-U", "--output=json", directory / "new.qcow2").stdout)

    assert [["0", "qcow2", "0", str(directory / "new.qcow2")], ["1", base_format, "0"]] == [rows[1], rows[2][:3]]
    assert os.path.samefile(directory / base, recorded["full-backing-filename"])
    assert base_format == recorded["backing-filename-format"]
    with chains.open_chain(str(directory / "new.qcow2"), Policy()) as opened:
        require_same(located(changing, device), opened)


def test_the_document_of_a_snapshot_has_the_chain(changing: Address, capsys: pytest.CaptureFixture[str]) -> None:
    new = Path(changing.path).with_name("new.qcow2")

    code = cli.main(["snapshot", "--json", "--qmp", changing.path, "disk1", str(new)])
    document = json.loads(capsys.readouterr().out)

    assert (0, 1, "disk1") == (code, document["version"], document["device"])
    assert [str(new), str(new.with_name("b.qcow2"))] == [image["file"] for image in document["chain"]]


def test_what_qemu_refuses_is_told_in_its_words(changing: Address, capsys: pytest.CaptureFixture[str]) -> None:
    """QEMU has its own idea of what it may write: here, no file in /proc."""
    code, lines = failure(capsys, "snapshot", "--qmp", changing.path, "disk1", "/proc/self/new.qcow2")

    assert (MonitorError.exit_code, 1) == (code, len(lines))
    assert lines[0].startswith(f"qcowfs: {changing.path}: QEMU refuses: ")


def test_a_follower_tells_of_each_new_chain_lets_others_in_and_sees_the_end(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path = tmp_path_factory.mktemp("v")
    qemu("qemu-img", "create", "-q", "-f", "qcow2", path / "a.qcow2", "1M")
    told: queue.Queue[DeviceFiles] = queue.Queue()
    node = f"driver=qcow2,node-name=n0,file.driver=file,file.filename={path}/a.qcow2"
    words = ["-blockdev", node, "-device", "virtio-blk-pci,drive=n0,id=disk0"]
    with stopped_machine(path, *words) as socket:
        machine = Address(path=str(socket))
        follower = DeviceFollower(located(machine, "disk0"))
        follower.start(told.put)
        for name in ("b", "c"):
            take_snapshot(machine, "disk0", str(path / f"{name}.qcow2"), None)
            assert str(path / f"{name}.qcow2") == told.get(timeout=PATIENCE).path
        with Monitor(machine) as monitor:
            device = find_device(monitor, "disk0")
            monitor.execute("block-commit", job_id="j", device=device.node, base=str(path / "b.qcow2"))
            while not monitor.execute("query-block-jobs")[0]["ready"]:
                assert monitor.wait(PATIENCE)
            monitor.execute("block-job-complete", device="j")
        assert str(path / "b.qcow2") == told.get(timeout=PATIENCE).path
        with Monitor(machine) as monitor:
            node = find_device(monitor, "disk0").node
            monitor.execute("blockdev-snapshot-internal-sync", device=node, name="inside")
        assert ["inside"] == [snapshot[1] for snapshot in told.get(timeout=PATIENCE).device.images[0].snapshots]
    assert str(path / "b.qcow2") == told.get(timeout=PATIENCE).path
    follower.stop(PATIENCE)

    assert told.empty()


def test_a_follower_tells_of_another_machine_with_images_of_the_same_names_and_of_one_that_may_not_write(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative names begin where that machine runs."""
    monkeypatch.setattr(follower_module, "RETRY_SECONDS", 0.05)
    path, told = tmp_path_factory.mktemp("v"), queue.Queue[DeviceFiles]()
    for name in ("a", "b"):
        (path / name).mkdir()
        qemu("qemu-img", "create", "-q", "-f", "qcow2", path / name / "disk", "1M")
    drive = ["-machine", "none", "-drive", "if=none,id=d,format=qcow2,file=disk"]
    with stopped_machine(path, *drive, cwd=path / "a") as socket:
        machine = Address(path=str(socket))
        follower = DeviceFollower(located(machine, "d"))
    with stopped_machine(path, *drive, cwd=path / "b"):
        follower.start(told.put)
        found = [told.get(timeout=PATIENCE)]
    with stopped_machine(path, "-machine", "none", "-drive", f"{drive[-1]},readonly=on", cwd=path / "b"):
        while not found[-1].device.read_only:
            found.append(told.get(timeout=PATIENCE))
    follower.stop(PATIENCE)

    assert {str(path / "b" / "disk")} == {files.path for files in found}


@pytest.mark.expect_warnings
def test_a_disk_on_a_server_is_found_and_its_writer_known(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No lock on a server tells that somebody writes; QEMU says so itself. What it has beside it may be named."""
    directory = tmp_path_factory.mktemp("v")
    qemu("qemu-img", "create", "-q", "-f", "qcow2", directory / "disk", "1M")
    qemu("qemu-img", "snapshot", "-c", "before", directory / "disk")
    with qemu_nbd(directory / "s", directory / "disk", "-f", "raw", writable=True) as server:
        drive = f"if=none,id=d0,format=qcow2,file={server.url}"
        with stopped_machine(directory, "-machine", "none", "-drive", drive) as monitor:
            args = argparse.Namespace(qmp=f"{monitor}:d0", allow_backing=[])
            files = take_device(args)
            assert files

            assert args.written
            with chains.open_chain(args.image, Policy(), image_format=args.image_format, written=True) as chain:
                require_same(files, chain)
                assert chain.remote
                assert [(True, ("before",))] == [
                    (layer.written_by_other, tuple(os.fsdecode(entry.name) for entry in layer.snapshots))
                    for layer in chain.layers
                ]
            top = directory / "over.qcow2"
            with Monitor(parse_address(str(monitor))[0]) as asked:
                asked.execute("blockdev-snapshot-sync", device="d0", **{"snapshot-file": str(top)})
            again = take_device(args)
            assert again
            with chains.open_chain(args.image, load_policy(args.allow_backing, ()), image_format="qcow2") as chain:
                require_same(again, chain)
                assert ["over.qcow2", "s"] == [layer.name for layer in chain.layers]
