"""`export`: what it refuses, leaves behind and tells. What it writes is for QEMU to judge: oracle/test_export.py."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from qcowfs import cli
from qcowfs.chain import open_chain
from qcowfs.cli.points import find_point, named_points
from qcowfs.cli.progress import line
from qcowfs.errors import QcowfsError, ReadFault, SourceError, UsageError
from qcowfs.export import job
from qcowfs.export.changes import pieces
from qcowfs.export.compression import COMPRESSIONS
from qcowfs.export.qcow2file import Qcow2Writer
from qcowfs.gate import Policy
from qcowfs.snapshot import by_age, require_unchanged
from qcowfs.vfs.names import file_name
from tests.support import forge, need
from tests.support.images import qemu
from tests.support.mounts import REPOSITORY, wait_until
from tests.support.tables import Tables

CLUSTER = 1 << 16
SIZE = 8 * CLUSTER
SNAPSHOTS_OFFSET = 64  # in the header
MAIN = "import sys; from qcowfs.cli import main; sys.exit(main())"
MARK = ".qcowfs-export-"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Two snapshots and an active state, each with clusters of its own."""
    path = tmp_path / "image.qcow2"
    snapshots = [
        forge.Snapshot(id=b"1", name=b"one", data={0: 1, 1: 2, 3: 4}, fields={"date_sec": 100}),
        forge.Snapshot(id=b"2", name=b"two", data={0: 1, 1: 9}, fields={"date_sec": 300}),
    ]
    path.write_bytes(forge.qcow2(data={0: 7}, snapshots=snapshots))
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "disk"


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """What takes seconds to compress."""
    path = tmp_path / "large.raw"
    path.write_bytes(os.urandom(1 << 20) * 64)
    return path


def run(*words: str | Path) -> int:
    return cli.main(["export", *map(str, words)])


def disk(**clusters: int) -> bytes:
    """Return a disk whose cluster N is full of `cN`."""
    return b"".join(bytes([clusters.get(f"c{number}", 0)]) * CLUSTER for number in range(SIZE // CLUSTER))


ONE, TWO = disk(c0=1, c1=2, c3=4), disk(c0=1, c1=9)


class TestRefusals:
    def test_a_file_that_exists_stays(self, image: Path, out: Path) -> None:
        out.write_text("mine")

        assert UsageError.exit_code == run(image, "one", out)
        assert "mine" == out.read_text()
        assert ["disk"] == os.listdir(out.parent)

    def test_force_replaces_it(self, image: Path, out: Path) -> None:
        out.write_text("mine")

        assert 0 == run("--force", image, "one", out)
        assert ONE == out.read_bytes()

    @pytest.mark.parametrize("words", [(), ("--force",)])
    @pytest.mark.parametrize("link", [os.symlink, os.link])
    def test_no_name_of_the_image_is_written(
        self, image: Path, out: Path, words: tuple[str, ...], link: Callable[[Path, Path], None]
    ) -> None:
        link(image, out)
        before = image.read_bytes()

        assert UsageError.exit_code == run(*words, image, "one", out)
        assert UsageError.exit_code == run(*words, image, "one", image)
        assert before == image.read_bytes()
        assert out.samefile(image)

    def test_a_backing_file_is_a_file_of_the_image_too(self, image: Path, tmp_path: Path) -> None:
        top = tmp_path / "top.qcow2"
        extensions = [(forge.BACKING_FORMAT, b"qcow2")]
        top.write_bytes(forge.qcow2(backing_name=b"image.qcow2", extensions=extensions))
        before = image.read_bytes()

        assert UsageError.exit_code == run("--force", top, "current", image)
        assert before == image.read_bytes()

    @pytest.mark.parametrize("replaced", ["one", "base", "link"])
    def test_an_overlay_does_not_replace_what_it_needs(self, image: Path, out: Path, replaced: str) -> None:
        """The older point's export would be lost, and what is left would be based on itself."""
        base, one, link = (out.with_name(name) for name in ("base", "one", "link"))
        assert 0 == run("-O", "qcow2", image, "two", base)
        assert 0 == run("--since", "two", "--backing", "base", image, "one", one)
        link.symlink_to("one")
        before = base.read_bytes(), one.read_bytes()

        words = ("--force", "--since", "one", "--backing", "one", image, "current", out.with_name(replaced))
        assert UsageError.exit_code == run(*words)
        assert before == (base.read_bytes(), one.read_bytes())
        assert ["base", "link", "one"] == sorted(os.listdir(out.parent))

    @pytest.mark.parametrize("leads_somewhere", [True, False])
    def test_a_symbolic_link_is_replaced_and_not_followed(
        self, image: Path, out: Path, tmp_path: Path, leads_somewhere: bool
    ) -> None:
        target = tmp_path / "target"
        if leads_somewhere:
            target.write_text("mine")
        out.symlink_to(target)

        assert UsageError.exit_code == run(image, "one", out)
        assert 0 == run("--force", image, "one", out)
        assert ONE == out.read_bytes()
        assert not out.is_symlink()
        assert leads_somewhere == target.exists()
        assert not leads_somewhere or target.read_text() == "mine"

    @pytest.mark.parametrize("kind", ["directory", "device", "fifo"])
    def test_only_a_file_is_replaced(self, image: Path, out: Path, kind: str) -> None:
        if kind == "device":
            out = Path("/dev/null")
        elif kind == "fifo":
            os.mkfifo(out)
        else:
            out.mkdir()

        assert UsageError.exit_code == run("--force", image, "one", out)
        assert not out.is_file()

    def test_a_directory_that_is_not_there_is_one_line(
        self, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / "missing" / "disk"

        assert SourceError.exit_code == run(image, "one", path)
        assert f"qcowfs: {path}: cannot write: No such file or directory\n" == capsys.readouterr().err

    @pytest.mark.skipif(os.geteuid() != 0, reason="root becomes nobody here")
    def test_no_permission_is_one_line(self, image: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for directory in (image.parent, out.parent):
            directory.chmod(0o755)
        os.seteuid(65534)
        try:
            code = run(image, "one", out)
        finally:
            os.seteuid(0)

        assert SourceError.exit_code == code
        assert f"qcowfs: {out}: cannot write: Permission denied\n" == capsys.readouterr().err

    def test_what_somebody_else_makes_meanwhile_stays(self, image: Path, out: Path) -> None:
        def make(total: Callable[[], int]) -> None:
            out.write_text("theirs")

        with open_chain(str(image), Policy()) as chain, pytest.raises(QcowfsError, match="somebody else"):
            job.export(chain, find_point(chain, "one"), str(out), job.Form(format="raw"), watch=make)

        assert "theirs" == out.read_text()
        assert ["disk"] == os.listdir(out.parent)

    @pytest.mark.parametrize(
        "words",
        [
            ("IMAGE",),
            ("IMAGE", "one"),
            ("--all", "DIR", "IMAGE", "one", "OUT"),
            ("--all", "DIR", "-O", "raw", "IMAGE"),
            ("--since", "one", "IMAGE", "two", "OUT"),
            ("--backing", "file", "IMAGE", "two", "OUT"),
            ("--backing-format", "raw", "IMAGE", "two", "OUT"),
            ("-O", "raw", "--since", "one", "--backing", "file", "IMAGE", "two", "OUT"),
            ("-c", "IMAGE", "one", "OUT"),
            ("-O", "qcow2", "IMAGE", "one", "-"),
            ("--json", "IMAGE", "one", "-"),
        ],
    )
    def test_words_that_contradict_each_other(self, image: Path, out: Path, words: tuple[str, ...]) -> None:
        places = {"IMAGE": str(image), "OUT": str(out), "DIR": str(out.parent)}

        assert UsageError.exit_code == run(*(places.get(word, word) for word in words))
        assert [] == os.listdir(out.parent)

    def test_a_snapshot_that_is_deleted_meanwhile_is_no_export(self, image: Path, out: Path) -> None:
        with open_chain(str(image), Policy(), lock=False) as chain:
            point = find_point(chain, "one")
            running = replace(point, layer=replace(point.layer, written_by_other=True))
            require_unchanged([running])
            with image.open("r+b") as file:  # the header counts one snapshot less
                file.seek(60)
                file.write(b"\0\0\0\0")

            with pytest.raises(QcowfsError, match="the snapshot was deleted"):
                job.export(chain, running, str(out), job.Form(format="raw"))

        assert [] == os.listdir(out.parent)

    def test_a_point_that_is_being_written_is_refused(self, image: Path, out: Path) -> None:
        with open_chain(str(image), Policy()) as chain:
            point = replace(find_point(chain, "current"), frozen=False)
            with pytest.raises(QcowfsError, match="another process is writing"):
                job.export(chain, point, str(out), job.Form(format="raw"))


class TestBacking:
    @pytest.fixture
    def older(self, image: Path, out: Path) -> Path:
        path = out.with_name("older.qcow2")
        assert 0 == run("-O", "qcow2", image, "one", path)
        return path

    def test_the_overlay_reads_as_the_point(self, image: Path, out: Path, older: Path) -> None:
        assert 0 == run("--since", "one", "--backing", "older.qcow2", image, "two", out)
        assert 0 == run(out, "current", out.with_name("again"))
        assert TWO == out.with_name("again").read_bytes()
        assert out.stat().st_size < older.stat().st_size

    def test_it_may_be_raw(self, image: Path, out: Path) -> None:
        raw = out.with_name("older.raw")
        assert 0 == run(image, "one", raw)

        assert 0 == run("--since", "one", "--backing", raw, "--backing-format", "raw", image, "two", out)
        assert 0 == run(out, "current", out.with_name("again"))
        assert TWO == out.with_name("again").read_bytes()

    def test_a_colon_is_no_protocol(self, image: Path, out: Path, older: Path) -> None:
        older.rename(out.with_name("10:30.qcow2"))

        assert 0 == run("--since", "one", "--backing", "10:30.qcow2", image, "two", out)
        with open_chain(str(out), Policy()) as chain:
            assert b"./10:30.qcow2" == chain.layers[0].backing_name

    @pytest.mark.parametrize(
        ("name", "words"), [("missing", ()), ("short", ()), ("short", ("--backing-format", "raw")), ("x" * 1024, ())]
    )
    def test_a_file_that_cannot_be_the_older_point(
        self, image: Path, out: Path, name: str, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
    ) -> None:
        out.with_name("short").write_bytes(bytes(512))

        assert 0 != run("--since", "one", "--backing", name, *words, image, "two", out)
        assert not out.exists()
        assert "raw if it is raw" not in capsys.readouterr().err or not words

    def test_both_the_same_is_an_empty_overlay(self, image: Path, out: Path, older: Path) -> None:
        assert 0 == run("--since", "one", "--backing", "older.qcow2", image, "one", out)
        assert out.stat().st_size == 4 * CLUSTER, "header, L1 table, refcount table and block"


class TestAll:
    def test_the_chain_is_printed_and_reads_as_the_points(
        self, image: Path, out: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert 0 == run("--all", out, image)

        printed = [row.split() for row in capsys.readouterr().out.splitlines()]
        assert ["one", "two", "current"] == [row[0] for row in printed[1:]]
        assert ["-", "one.qcow2", "two.qcow2"] == [row[-1] for row in printed[1:]]
        assert {"one.qcow2", "two.qcow2", "current.qcow2"} == set(os.listdir(out))
        for name, expected in (("one", ONE), ("two", TWO), ("current", disk(c0=7))):
            path = out.with_name(name)
            assert 0 == run(out / f"{name}.qcow2", "current", path)
            assert expected == path.read_bytes()

    def test_nothing_is_written_where_one_file_exists(self, image: Path, out: Path) -> None:
        out.mkdir()
        (out / "two.qcow2").write_text("mine")

        assert UsageError.exit_code == run("--all", out, image)
        assert ["two.qcow2"] == os.listdir(out)
        assert 0 == run("--all", out, "--force", image)

    def test_a_running_machines_state_is_left_out(self, image: Path) -> None:
        with open_chain(str(image), Policy()) as chain:
            points = [replace(point, frozen=point.kind != "active") for _, point in named_points(chain)]

        assert [b"one", b"two"] == [point.snapshot_name for point in by_age(points) if point.frozen]

    def test_long_names_fit(self) -> None:
        names = ["n" * 251, "ü" * 125, "n" * 248]

        found = [file_name(name, ".qcow2") for name in names]

        assert all(len(name.encode()) <= 255 and name.endswith(".qcow2") for name in found)
        assert "n" * 248 + ".qcow2" == found[2]
        assert file_name("n" * 250, ".qcow2") != found[0]

    def test_the_document(self, image: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert 0 == run("--all", out, "--json", "-c", image)

        document = json.loads(capsys.readouterr().out)
        assert (1, str(image)) == (document["version"], document["image"])
        assert [
            ("one", str(out / "one.qcow2"), "zlib", SIZE, None, None),
            ("two", str(out / "two.qcow2"), "zlib", SIZE, "one.qcow2", "qcow2"),
            ("current", str(out / "current.qcow2"), "zlib", SIZE, "two.qcow2", "qcow2"),
        ] == [
            tuple(file[key] for key in ("point", "file", "compression", "virtual_size", "backing", "backing_format"))
            for file in document["files"]
        ]


class TestUnreadable:
    @pytest.fixture
    def broken(self, image: Path) -> Path:
        """Cluster 1 of the active state has an L2 entry that cannot be; cluster 2 has data."""
        image.write_bytes(forge.qcow2(data={0: 7, 1: 8, 2: 9}))
        tables = Tables(image)
        tables.l2(1, tables.l2(1) + 512)
        return image

    @pytest.mark.parametrize("words", [(), ("-O", "qcow2"), ("-O", "qcow2", "-c")])
    def test_it_is_an_error_that_names_the_place(
        self, broken: Path, out: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
    ) -> None:
        assert ReadFault.exit_code == run(*words, broken, "current", out)
        assert [] == os.listdir(out.parent)
        assert re.search(
            r"guest offset 0x10000: .*not aligned to a cluster\nhint: --keep-going", capsys.readouterr().err
        )

    @pytest.mark.parametrize("words", [(), ("-O", "qcow2"), ("-O", "qcow2", "-c")])
    def test_keep_going_writes_the_rest_and_names_the_hole(
        self, broken: Path, out: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
    ) -> None:
        assert 1 == run(*words, "--keep-going", "--json", broken, "current", out)

        told = capsys.readouterr()
        (unreadable,) = json.loads(told.out)["files"][0]["unreadable"]
        assert (CLUSTER, CLUSTER) == (unreadable["start"], unreadable["length"])
        assert told.err.startswith("qcowfs: current: bytes 0x10000 to 0x20000 are zeros: ")
        again = out.with_name("again")
        assert 0 == run(out, "current", again) if words else not out.rename(again).is_symlink()
        assert disk(c0=7, c2=9) == again.read_bytes()

    def test_an_overlay_hides_what_the_backing_file_has_there(self, image: Path, out: Path) -> None:
        """Were it left out of the overlay, the older point's bytes would show."""
        assert 0 == run("-O", "qcow2", image, "one", out.with_name("older"))
        tables = Tables(image)
        tables.l2(0, tables.l2(0) + 512)

        assert 1 == run("--keep-going", "--since", "one", "--backing", "older", image, "current", out)
        assert 0 == run(out, "current", out.with_name("again"))
        assert bytes(SIZE) == out.with_name("again").read_bytes()

    def test_an_older_point_that_cannot_be_read_is_hidden(self, image: Path, out: Path) -> None:
        """Nobody knows what the backing file has there, so zeros are written too."""
        tables = Tables(image)
        tables.l1_offset = tables.word(tables.word(SNAPSHOTS_OFFSET))  # the first field of the first entry
        assert tables.l2(1) & 0xFFFF == 0, "the L2 table is not that of snapshot one"
        tables.l2(1, tables.l2(1) + 512)
        out.with_name("older").write_bytes(b"\xff" * SIZE)

        words = ("--since", "one", "--backing", "older", "--backing-format", "raw")
        assert 0 == run(*words, image, "current", out)
        assert 0 == run(out, "current", out.with_name("again"))
        assert bytes(CLUSTER) == out.with_name("again").read_bytes()[CLUSTER : 2 * CLUSTER]


class TestStandardOutput:
    def exported(self, *words: str | Path) -> subprocess.CompletedProcess[bytes]:
        words = (sys.executable, "-c", MAIN, "export", *words)
        return subprocess.run([*map(str, words)], cwd=REPOSITORY, capture_output=True, timeout=60)

    def test_the_whole_disk_comes_out(self, image: Path) -> None:
        done = self.exported(image, "one", "-")

        assert (0, b"") == (done.returncode, done.stderr)
        assert ONE == done.stdout

    def test_what_cannot_be_read_ends_it(self, image: Path) -> None:
        tables = Tables(image)
        tables.l2(0, tables.l2(0) + 512)

        assert ReadFault.exit_code == self.exported(image, "current", "-").returncode
        done = self.exported("--keep-going", image, "current", "-")
        assert (1, bytes(SIZE)) == (done.returncode, done.stdout)


class TestInterrupted:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    def test_nothing_is_left(self, large: Path, out: Path, number: signal.Signals) -> None:
        words = ["export", "--image-format", "raw", "-O", "qcow2", "-c", str(large), "current", str(out)]
        with subprocess.Popen([sys.executable, "-c", MAIN, *words], cwd=REPOSITORY, stderr=subprocess.PIPE) as process:
            wait_until(lambda: any(name.startswith(MARK) for name in os.listdir(out.parent)), "no file is made")
            time.sleep(0.05)
            process.send_signal(number)
            _, said = process.communicate(timeout=60)

        assert (cli.INTERRUPTED, b"") == (process.returncode, said)
        assert [] == os.listdir(out.parent)


class TestProgress:
    def test_the_line(self) -> None:
        half = line("disk", 512 << 20, 1 << 30, 4.0)

        assert "disk [############............]  50%  512 MiB of 1 GiB  128 MiB/s  0:04 to go" == half
        assert "100%" in line("disk", 0, 0, 0.0)
        assert "1:00:00 to go" in line("disk", 1, 3601, 1.0)

    def test_a_terminal_sees_it_and_is_clean_afterwards(self, large: Path, out: Path) -> None:
        reader, writer = pty.openpty()
        words = ["export", "--image-format", "raw", "-O", "qcow2", "-c", str(large), "current", str(out)]
        with subprocess.Popen([sys.executable, "-c", MAIN, *words], cwd=REPOSITORY, stderr=writer) as process:
            os.close(writer)
            said = read_all(reader)
        os.close(reader)

        assert 0 == process.returncode
        assert b"disk [" in said
        assert said.endswith(b"\r\x1b[K")


def read_all(terminal: int) -> bytes:
    said = b""
    with suppress(OSError):  # EIO: nobody has its other end
        while data := os.read(terminal, 4096):
            said += data
    return said


def test_pieces_cover_each_unit_once() -> None:
    ranges = [(5, 9), (9, 11), (20, 20), (30, 31), (38, 100)]

    assert [(4, 12), (20, 20), (28, 32), (36, 40), (40, 80), (80, 99)] == list(pieces(ranges, 4, 40, 99))


def test_zlib_looks_back_no_farther_than_qemu_does() -> None:
    """Piece by piece, so that zlib has nothing but its window of 4 KiB, as QEMU sets it."""
    twice = os.urandom(CLUSTER // 4)
    cluster = twice + bytes(CLUSTER // 8) + twice + bytes(CLUSTER // 8) + b"near" * (CLUSTER // 16)

    stream = COMPRESSIONS["zlib"](memoryview(cluster)) or b""
    decompressor = zlib.decompressobj(wbits=-12)
    made = decompressor.decompress(stream, 512)
    while not decompressor.eof:
        made += decompressor.decompress(decompressor.unconsumed_tail, 512)

    assert cluster == made
    assert len(stream) < CLUSTER


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_what_does_not_shrink_is_not_compressed(compression: str) -> None:
    assert COMPRESSIONS[compression](memoryview(os.urandom(CLUSTER))) is None


def test_a_disk_that_qcow2_cannot_hold_is_refused_before_its_table_is_made(tmp_path: Path) -> None:
    """Own fixture: QEMU opens L1 tables of 32 MiB at most, which reach over 2 PiB."""
    with (tmp_path / "out").open("wb") as file:
        Qcow2Writer(file.fileno(), 2 << 50)
        for size in ((2 << 50) + 1, 1 << 62):
            with pytest.raises(QcowfsError, match="too large for a qcow2 image"):
                Qcow2Writer(file.fileno(), size)


def test_a_directory_that_moves_takes_the_file_along(image: Path, out: Path) -> None:
    def move(total: Callable[[], int]) -> None:
        out.parent.rename(out.parent.with_name("moved"))

    with open_chain(str(image), Policy()) as chain:
        job.export(chain, find_point(chain, "one"), str(out), job.Form(format="raw"), watch=move)

    assert ["disk"] == os.listdir(out.parent.with_name("moved"))


def test_a_name_that_cannot_be_given_leaves_nothing(image: Path, out: Path) -> None:
    def make(total: Callable[[], int]) -> None:
        out.mkdir()

    with open_chain(str(image), Policy()) as chain, pytest.raises(SourceError, match="cannot write: Is a directory"):
        job.export(chain, find_point(chain, "one"), str(out), job.Form(format="raw"), force=True, watch=make)

    assert ["disk"] == os.listdir(out.parent)


@pytest.mark.parametrize(
    ("top", "base", "expected"), [(0o644, 0o644, 0o644), (0o600, 0o644, 0o600), (0o644, 0o640, 0o640), (0o444,) * 3]
)
def test_a_copy_is_as_private_as_the_image(image: Path, out: Path, top: int, base: int, expected: int) -> None:
    overlay = image.with_name("top.qcow2")
    extensions = [(forge.BACKING_FORMAT, b"qcow2")]
    overlay.write_bytes(forge.qcow2(backing_name=b"image.qcow2", extensions=extensions))
    overlay.chmod(top)
    image.chmod(base)
    before = os.umask(0o002)
    try:
        assert 0 == run(overlay, "current", out)
    finally:
        os.umask(before)

    assert expected | 0o600 == out.stat().st_mode & 0o777


def test_a_copy_is_as_private_as_the_file_that_has_the_data(out: Path, tmp_path: Path) -> None:
    need("qemu-img")
    image, data = tmp_path / "external.qcow2", tmp_path / "data"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={data},data_file_raw=on", image, "1M")
    image.chmod(0o644)
    data.chmod(0o600)

    assert 0 == run(image, "current", out)
    assert 0o600 == out.stat().st_mode & 0o777
