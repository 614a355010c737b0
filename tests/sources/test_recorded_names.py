"""Names that a real QEMU records in an overlay that it makes of a disk on a server, and what is read by them.

Evidence: own fixtures. QEMU writes the names, and qemu-img reads the same overlays, where it understands its own names.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qcowfs import cli
from qcowfs.chain import open_chain
from qcowfs.errors import GateRefused
from qcowfs.policy import Policy, load_policy
from tests.support import need
from tests.support.nbd import qemu_nbd
from tests.support.qemu import qemu, qemu_io

need("qemu-system-x86_64", "qemu-img", "qemu-nbd", "qemu-io")

SIZE = "8M"


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a short name, in which a base, and another one that nobody is to see."""
    path = tmp_path_factory.mktemp("v")
    for name, pattern in (("base", 1), ("other", 9)):
        qemu("qemu-img", "create", "-q", "-f", "qcow2", path / f"{name}.qcow2", SIZE)
        qemu_io(path / f"{name}.qcow2", f"write -P {pattern} 0 4M")
    return path


@contextmanager
def served(place: Path, middle: Path) -> Iterator[tuple[str, str]]:
    """Serve `middle` and the base, and yield the sockets."""
    qemu_io(middle, "write -P 2 2M 4M")
    with (
        qemu_nbd(place / "m", middle, "-f", "raw", "-x", "mid"),
        qemu_nbd(place / "b", place / "base.qcow2", "-f", "raw"),
    ):
        yield str(place / "m"), str(place / "b")


def snapshot(place: Path, *words: str) -> tuple[Path, str]:
    """Let QEMU put an overlay on its node `disk`; returns the overlay, and the name in it."""
    top = place / "top.qcow2"
    command = {"node-name": "disk", "snapshot-file": str(top), "format": "qcow2", "snapshot-node-name": "new"}
    said = [
        {"execute": "qmp_capabilities"},
        {"execute": "blockdev-snapshot-sync", "arguments": command},
        {"execute": "quit"},
    ]
    done = subprocess.run(
        ["qemu-system-x86_64", "-machine", "none", "-display", "none", "-nodefaults", "-qmp", "stdio", *words],
        input="\n".join(map(json.dumps, said)),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )

    assert "error" not in done.stdout, done.stdout
    facts = json.loads(qemu("qemu-img", "info", "--output=json", top).stdout)
    return top, facts["backing-filename"]


def node(name: str, socket: str, export: str, *more: str) -> list[str]:
    """Return the words for a qcow2 node on an export."""
    protocol = f"driver=nbd,node-name={name}-file,server.type=unix,server.path={socket},export={export},read-only=on"
    return [
        "-blockdev",
        protocol,
        "-blockdev",
        ",".join([f"driver=qcow2,node-name={name},file={name}-file,read-only=on", *more]),
    ]


def exported(image: Path, allow: str, to: Path) -> bytes:
    assert cli.main(["export", "--allow-backing", allow, str(image), "current", str(to)]) == 0
    return to.read_bytes()


def as_qemu_reads(middle: Path, base: Path, to: Path) -> bytes:
    """Return the disk of `middle` on `base`, by qemu-img and on files."""
    copy = to.with_name("copy.qcow2")
    copy.write_bytes(middle.read_bytes())
    qemu("qemu-img", "rebase", "-u", "-b", base, "-F", "qcow2", copy)
    qemu("qemu-img", "convert", "-O", "raw", copy, to)
    return to.read_bytes()


@pytest.mark.expect_warnings  # NBD has no locks
def test_a_backing_file_that_qemu_was_given_in_the_place_of_none(place: Path) -> None:
    middle = place / "mid.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", middle, SIZE)
    with served(place, middle) as (mid, base):
        top, name = snapshot(place, *node("base", base, ""), *node("disk", mid, "mid", "backing=base"))
        qemu("qemu-img", "convert", "-O", "raw", top, place / "judge.raw")

        assert '"backing": {' in name
        assert (place / "judge.raw").read_bytes() == exported(top, "any", place / "ours.raw")


@pytest.mark.expect_warnings  # NBD has no locks
def test_a_backing_file_that_qemu_was_given_goes_before_that_of_the_header(place: Path) -> None:
    """QEMU 7.2 cannot read what it wrote here ("server.path cannot be used with a file name")."""
    middle = place / "mid.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-b", place / "other.qcow2", "-F", "qcow2", middle)
    with served(place, middle) as (mid, base):
        top, name = snapshot(place, *node("base", base, ""), *node("disk", mid, "mid", "backing=base"))

        assert '"backing": {' in name
        assert as_qemu_reads(middle, place / "base.qcow2", place / "judge.raw") == exported(
            top, "any", place / "ours.raw"
        )


def test_the_gate_judges_such_a_name_as_any_other(place: Path) -> None:
    middle = place / "mid.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", middle, SIZE)
    with served(place, middle) as (mid, base):
        top, _ = snapshot(place, *node("base", base, ""), *node("disk", mid, "mid", "backing=base"))
        policy = load_policy([f"nbd+unix:///mid?socket={mid}"], ())
        with pytest.raises(GateRefused) as caught:
            open_chain(str(top), policy)

    assert f"{top}: it names the backing file nbd+unix:///?socket={base}" in str(caught.value)


@pytest.mark.parametrize(
    ("backing", "layers"),
    [
        ("null", ["top", "mid"]),
        ('{"driver": "raw", "file": {"driver": "file", "filename": "@/base.qcow2"}}', ["top", "mid", "base"]),
        ('{"driver": "raw"}', ["top", "mid", "other"]),
        ('{"backing": null}', ["top", "mid", "other"]),
    ],
)
def test_files_are_put_together_as_qemu_does(place: Path, backing: str, layers: list[str]) -> None:
    middle, top = place / "mid.qcow2", place / "top.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-b", place / "other.qcow2", "-F", "qcow2", middle)
    qemu_io(middle, "write -P 2 2M 1M")
    text = f'json:{{"driver": "qcow2", "file": {{"driver": "file", "filename": "@/mid.qcow2"}}, "backing": {backing}}}'
    qemu("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", text.replace("@", str(place)), "-F", "qcow2", top, SIZE)
    qemu("qemu-img", "convert", "-O", "raw", top, place / "judge.raw")

    with open_chain(str(top), Policy()) as chain:
        assert [f"{name}.qcow2" for name in layers] == [layer.name for layer in chain.layers]
    assert (place / "judge.raw").read_bytes() == exported(top, "any", place / "ours.raw")


def test_a_chain_that_a_name_makes_endless_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    middle, top = place / "mid.qcow2", place / "top.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", middle, SIZE)
    text = f'json:{{"file.filename": "{middle}", "backing": {{"driver": "qcow2", "file.filename": "{top}"}}}}'
    qemu("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", text, "-F", "qcow2", top, SIZE)

    assert cli.main(["list", str(top)]) == 11
    assert "its backing chain never ends" in capsys.readouterr().err


@pytest.mark.expect_warnings
def test_a_password_in_a_name_is_not_told(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """libnbd takes no password; what an image holds is shown all the same, and so is what cannot be opened."""
    top = place / "top.qcow2"
    with served(place, place / "base.qcow2") as (mid, _):
        for name in (
            f"nbd+unix://me:secret@/mid?socket={mid}",
            f'json:{{"driver":"nbd","filename":"nbd://me:secret@h/{mid}"}}',
        ):
            qemu("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", name, "-F", "raw", top, SIZE)
            for words in (["list"], ["info"], ["info", "--json"], ["info", "--allow-backing", "any"]):
                cli.main([*words, str(top)])

    said = capfd.readouterr()
    assert "...@" in said.out + said.err
    assert "secret" not in said.out + said.err
