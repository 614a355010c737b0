"""The command line: one line for each error, documented exit codes, no traceback, no needless import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qcowfs import cli
from qcowfs.cli import output
from qcowfs.errors import GateRefused, NotAnImage, PointNotFound, SourceError, UnsupportedImage, UsageError
from tests.support import need
from tests.support.images import qemu


@pytest.fixture
def image(tmp_path: Path) -> Path:
    need("qemu-img", "qemu-io")
    path = tmp_path / "data.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", path, "4M")
    qemu("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 1M", path)
    qemu("qemu-img", "snapshot", "-c", "before-upgrade", path)
    return path


def run(*words: str | Path, blocked: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own, where the modules `blocked` cannot be imported."""
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked!r})); from qcowfs.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)


def failure(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, list[str]]:
    """Run in this process; return the exit code and the lines on standard error. Nothing goes to standard output."""
    code = cli.main([str(word) for word in words])
    said = capsys.readouterr()
    assert said.out == ""
    return code, said.err.splitlines()


@pytest.mark.parametrize("verb", ["list", "info", "map"])
def test_verbs_work_where_pyfuse3_and_trio_cannot_be_imported(image: Path, verb: str) -> None:
    done = run(verb, "--json", image, blocked=("pyfuse3", "trio"))

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)


def test_diff_works_where_pyfuse3_and_trio_cannot_be_imported(image: Path) -> None:
    done = run("diff", "--blocks", "--json", image, f"{image}:before-upgrade", blocked=("pyfuse3", "trio"))

    assert (0, "") == (done.returncode, done.stderr)
    assert json.loads(done.stdout)["same"]


def test_mount_without_pyfuse3_says_so(image: Path, tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()

    done = run("mount", image, tmp_path / "mnt", blocked=("pyfuse3",))

    assert done.returncode == 15
    assert done.stderr.startswith("qcowfs: pyfuse3 cannot be imported")
    assert "Traceback" not in done.stderr


def bad_files(folder: Path) -> dict[str, tuple[Path, int, str]]:
    files = {
        "missing": (folder / "missing", SourceError.exit_code, "No such file or directory"),
        "directory": (folder, SourceError.exit_code, "a directory"),
        "fifo": (folder / "fifo", SourceError.exit_code, "a FIFO"),
        "device": (Path("/dev/null"), SourceError.exit_code, "a character device"),
        "empty": (folder / "empty", NotAnImage.exit_code, "it is empty"),
        "text": (folder / "text", NotAnImage.exit_code, "no known format"),
        "vmdk": (folder / "vmdk", UnsupportedImage.exit_code, "a vmdk image"),
        "luks": (folder / "luks", UnsupportedImage.exit_code, "a luks image"),
    }
    os.mkfifo(folder / "fifo")
    (folder / "empty").touch()
    (folder / "text").write_text("hello " * 100)
    (folder / "vmdk").write_bytes(b"KDMV".ljust(1000, b"\0"))
    (folder / "luks").write_bytes(b"LUKS\xba\xbe".ljust(1000, b"\0"))
    return files


@pytest.mark.timeout(10)
@pytest.mark.parametrize("kind", ["missing", "directory", "fifo", "device", "empty", "text", "vmdk", "luks"])
@pytest.mark.parametrize("verb", ["list", "info", "map", "ls"])
def test_bad_input_is_one_line_and_its_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str, kind: str
) -> None:
    path, expected, words = bad_files(tmp_path)[kind]

    code, lines = failure(capsys, verb, path)

    assert expected == code
    assert lines[0].startswith(f"qcowfs: {path}: ")
    assert words in lines[0]
    assert [line for line in lines[1:] if not line.startswith("hint: ")] == []


@pytest.mark.skipif(os.geteuid() != 0, reason="root becomes nobody here")
def test_no_permission_is_one_line(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image.chmod(0o600)

    os.seteuid(65534)
    try:
        code, lines = failure(capsys, "list", image)
    finally:
        os.seteuid(0)

    assert SourceError.exit_code == code
    assert [f"qcowfs: {image}: cannot open: Permission denied"] == lines


def test_a_missing_backing_file_is_named_with_the_layer_that_names_it(
    image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overlay = tmp_path / "top.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-b", image.name, "-F", "qcow2", overlay)
    image.unlink()

    code, lines = failure(capsys, "list", overlay)

    assert SourceError.exit_code == code
    assert f"qcowfs: {overlay}: cannot open backing file {image}: No such file or directory" == lines[0]


@pytest.mark.parametrize("verb", ["list", "info", "map"])
def test_every_verb_obeys_the_gate_and_a_refusal_names_the_layer_the_file_and_the_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    need("qemu-img")
    overlay = tmp_path / "top.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-b", "/etc/passwd", "-F", "raw", overlay, "1M")

    code, lines = failure(capsys, verb, overlay)

    assert GateRefused.exit_code == code
    assert lines[0].startswith(f"qcowfs: {overlay}: it names the backing file /etc/passwd: ")
    assert lines[1] == "hint: --allow-backing /etc allows it"
    assert cli.main([verb, str(overlay), "--allow-backing", "/etc"]) == 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "the following arguments are required: VERB"),
        (["lst", "x"], "'lst' is not a verb of qcowfs"),
        (["list"], "the following arguments are required: IMAGE"),
        (["list", "--nonsense", "x"], "unrecognized arguments: --nonsense"),
        (["list", "--allow-backing", "/no/such/dir", "x"], "--allow-backing /no/such/dir: not a directory"),
    ],
)
def test_wrong_words_are_usage_errors(capsys: pytest.CaptureFixture[str], words: list[str], expected: str) -> None:
    code, lines = failure(capsys, *words)

    assert UsageError.exit_code == code == 2
    assert lines[0].startswith(f"qcowfs: {expected}")


@pytest.mark.parametrize(
    "words",
    [
        ["map", "I", "--json", "current"],
        ["diff", "I", "current", "--blocks", "current"],
        ["export", "I", "--force", "current", "OUT"],
        ["export", "I", "current", "--force", "OUT"],
    ],
)
def test_options_may_stand_between_other_words(image: Path, tmp_path: Path, words: list[str]) -> None:
    """What argparse alone does not understand where one of the words may be left out."""
    known = {"I": str(image), "OUT": str(tmp_path / "out")}
    assert cli.main([known.get(word, word) for word in words]) == 0


def test_a_misspelt_verb_is_recognized(capsys: pytest.CaptureFixture[str]) -> None:
    assert failure(capsys, "lst")[1][1] == "hint: did you mean 'list'?"


def test_help_teaches_with_examples(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], *([verb] for verb in ("list", "ls", "cat", "diff", "history", "info", "map"))):
        with pytest.raises(SystemExit) as ended:
            cli.main([*words, "--help"])

        assert ended.value.code == 0
        assert "examples:" in capsys.readouterr().out


def test_version_goes_to_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("qcowfs 0.")


def test_a_reader_that_goes_away_is_no_error(image: Path) -> None:
    command = f"{sys.executable} -m qcowfs map --json {image} | head -c 1; exit ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}

    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, env=environment)

    assert done.returncode in (0, 141)
    assert done.stderr == ""


def test_an_internal_error_is_one_line_and_a_traceback_only_with_debug(
    image: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qcowfs.cli.list.named_points", lambda chain: 1 // 0)

    code, lines = failure(capsys, "list", image)

    assert code == 1
    assert lines[:1] == ["qcowfs: internal error: ZeroDivisionError('integer division or modulo by zero')"]
    with pytest.raises(ZeroDivisionError):
        cli.main(["--debug", "list", str(image)])


def test_names_from_an_image_cannot_command_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    need("qemu-img")
    path = tmp_path / "i.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
    qemu("qemu-img", "snapshot", "-c", "\x1b[31mred\x07\n", path)

    for verb in ("list", "info"):
        assert cli.main([verb, str(path)]) == 0
        printed = capsys.readouterr().out
        assert "\x1b" not in printed
        assert "\x07" not in printed


@pytest.mark.parametrize(
    ("text", "expected"),
    [("current", None), ("current.raw", None), ("before-upgrade", b"1"), ("before-upgrade.raw", b"1"), ("1", b"1")],
)
def test_a_point_is_found_by_its_name_or_id(image: Path, text: str, expected: bytes | None) -> None:
    from qcowfs.chain import open_chain
    from qcowfs.cli.points import find_point
    from qcowfs.gate import Policy

    with open_chain(str(image), Policy()) as chain:
        assert expected == find_point(chain, text).snapshot_id


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("current", ("current", "")),
        ("current:", ("current", "")),
        ("current.raw:p1", ("current", "p1")),
        ("before-upgrade:p1/a:b", ("before-upgrade", "p1/a:b")),
        ("before-upgrade:p1", ("before-upgrade", "p1")),
        ("1:etc", ("before-upgrade", "etc")),
        ("with:colon", ("with:colon", "")),
        ("with:colon:p1", ("with:colon", "p1")),
        ("with:x", ("with", "x")),
        ("3:p1", ("with:colon", "p1")),
    ],
)
def test_the_longest_text_before_a_colon_that_means_a_point_is_the_point(
    image: Path, text: str, expected: tuple[str, str]
) -> None:
    from qcowfs.chain import open_chain
    from qcowfs.cli.points import find_place
    from qcowfs.gate import Policy

    for name in ("with", "with:colon"):
        qemu("qemu-img", "snapshot", "-c", name, image)

    with open_chain(str(image), Policy()) as chain:
        name, point, path = find_place(chain, text)
        assert expected == (name, path)
        assert point.snapshot_name == (None if name == "current" else name.encode())


def test_a_place_in_no_point_suggests_the_nearest(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("ls", "cat"):
        code, lines = failure(capsys, verb, image, "before-upgrad:p1/x:y")

        assert PointNotFound.exit_code == code
        assert lines[0].endswith("no point before-upgrad: not a name, an id or a snapshot's name")
        assert lines[1] == "hint: did you mean before-upgrade?"


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("before-upgrade/p1/x", "a colon stands between POINT and PATH: before-upgrade:p1/x"),
        ("p1/etc", "POINT comes before PATH: current:p1/etc"),
    ],
)
def test_a_path_as_in_a_mount_is_told_how_it_is_written(
    image: Path, capsys: pytest.CaptureFixture[str], text: str, hint: str
) -> None:
    _code, lines = failure(capsys, "ls", image, text)

    assert lines[1] == f"hint: {hint}"


def test_a_time_that_no_calendar_has_is_seconds() -> None:
    """A guest may have set its clock to anything, and a hostile file system has 64 bits for it."""
    assert "1969-12-31T23:59:59.999999999Z" == output.utc_date(-1)
    assert f"@{2**62}.000000007" == output.utc_date(2**62 * 10**9 + 7)
    assert f"@{-(2**62)}" == output.local_date(-(2**62) * 10**9)


def test_a_point_that_is_not_there_suggests_the_nearest(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = failure(capsys, "map", image, "before-upgrad")

    assert PointNotFound.exit_code == code
    assert lines[1] == "hint: did you mean before-upgrade?"


def test_two_snapshots_of_one_name_are_told_apart_by_id(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    qemu("qemu-img", "snapshot", "-c", "before-upgrade", image)

    code, lines = failure(capsys, "map", image, "before-upgrade")

    assert PointNotFound.exit_code == code
    assert "2 points" in lines[0]
    assert cli.main(["map", str(image), "before-upgrade#2"]) == 0


def shell(command: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command line as `$@` of a shell's `command`, which can do with descriptors what subprocess cannot."""
    code = "import sys; from qcowfs.cli import main; sys.exit(main())"
    arguments = ["sh", "-c", command, "sh", sys.executable, "-c", code, *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    return subprocess.run(arguments, capture_output=True, text=True, timeout=60, env=environment)


@pytest.mark.parametrize("verb", ["list", "info", "map"])
def test_verbs_end_well_with_standard_output_closed(image: Path, verb: str) -> None:
    done = shell('exec "$@" >&-', verb, image)

    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("words", [("list",), ("map", "--json")])
def test_output_that_finds_no_room_is_one_line(image: Path, words: tuple[str, ...]) -> None:
    done = shell('exec "$@" >/dev/full', *words, image)

    assert (done.returncode, done.stderr) == (1, "qcowfs: standard output: No space left on device\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("where", ["2>/dev/full", "2>&-"])
def test_an_error_that_cannot_be_told_has_its_exit_code_all_the_same(tmp_path: Path, where: str) -> None:
    done = shell(f'"$@" {where}; echo "$?"', "list", tmp_path / "missing")

    assert done.stdout.splitlines()[-1:] == [str(SourceError.exit_code)]
    assert "missing" not in done.stdout, "an error among the output"


def test_what_the_person_typed_is_escaped_too(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Scripts put names into command lines that they got from somebody else."""
    for words in (("list", image, "\x1b[31m"), ("list", "--\x1b[31m", image), ("mount", image, image, "\x1b[31m")):
        code, lines = failure(capsys, *words)

        assert code == UsageError.exit_code
        assert "\\x1b[31m" in lines[0]
        assert "\x1b" not in "".join(lines)


def test_a_name_that_the_locale_cannot_show_is_escaped(image: Path) -> None:
    foreign = image.rename(image.with_name("\u65e5.qcow2"))

    done = shell('PYTHONIOENCODING=ascii exec "$@"', "list", foreign)

    assert done.returncode == 0, done.stderr
    assert "\\u65e5.qcow2" in done.stdout


@pytest.mark.parametrize("name", ["a\nb", "a\\x0ab", "\x1b[31m", "\u65e5", "\u202e"])
def test_json_has_names_of_files_as_they_are(image: Path, name: str) -> None:
    """A program opens the file by it, so an escape would be another file's name."""
    other = image.rename(image.with_name(name))

    document = json.loads(run("list", "--json", other).stdout)

    assert str(other) == document["image"]
    assert {name} == {point["layer"] for point in document["points"]}
