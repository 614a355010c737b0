"""The gate's policy: the words of the command line and of the configuration files. Own fixtures."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from qcowfs import limits, policy
from qcowfs.errors import UsageError
from qcowfs.policy import Policy, load_policy
from qcowfs.source.url import parse_url

Configure = Callable[[str], str]


@pytest.fixture
def configure(tmp_path: Path) -> Configure:
    """Return what writes a configuration file and returns its name."""

    def write(content: str) -> str:
        path = tmp_path / "config"
        path.write_text(content)
        return str(path)

    return write


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty home directory; this machine's own configuration is not there either."""
    path = tmp_path / "home"
    path.mkdir()
    monkeypatch.setenv("HOME", str(path))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setattr(policy, "SYSTEM_CONFIGURATION", str(tmp_path / "qcowfs.conf"))
    return path


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("/srv/images/a", True),
        ("/srv/images/a/b", True),
        ("/srv/images", True),
        ("/srv/images-more/a", False),
        ("/srv", False),
        ("/dev/dm-3", True),
        ("/dev/dm-30", False),
    ],
)
def test_a_word_covers_itself_and_what_is_below_it(place: str, expected: bool) -> None:
    assert expected == Policy(allow=("/srv/images", "/dev/dm-3")).covers(place)


def test_the_root_covers_everything_and_no_word_covers_nothing() -> None:
    assert Policy(allow=("/",)).covers("/etc/passwd")
    assert Policy(allow_any=True).covers("/etc/passwd")
    assert not Policy().covers("/etc/passwd")


def test_words_are_real_paths_of_directories_files_and_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("directory")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))

    found = load_policy(["link", "file", "~/directory", "/dev/null"], [])

    expected = (f"{tmp_path}/directory", f"{tmp_path}/file", f"{tmp_path}/directory", "/dev/null")
    assert Policy(allow=expected) == found


def test_any_is_a_word_of_its_own(tmp_path: Path) -> None:
    assert Policy(allow=(str(tmp_path),), allow_any=True) == load_policy([str(tmp_path), "any"], [])
    assert Policy(allow=(str(tmp_path / "any"),)) == load_policy([self_made(tmp_path / "any")], [])


def self_made(directory: Path) -> str:
    directory.mkdir()
    return str(directory)


def test_a_word_that_names_nothing_is_told_at_once() -> None:
    with pytest.raises(
        UsageError, match="--allow-backing /no/such: not a directory, a file or a block device"
    ) as caught:
        load_policy(["/no/such"], [])
    assert caught.value.hint == "DIR or URL for everything below it, or any for every file"


@pytest.mark.parametrize("written", ["/a:/b", "/a:\n  /b", "\n  /a\n  /b\n", " /a : /b ", ":/a::/b:"])
def test_a_configuration_lists_paths(configure: Configure, written: str) -> None:
    assert Policy(allow=("/a", "/b")) == load_policy((), [configure(f"[backing]\nallow = {written}\n")])


def test_a_configuration_may_say_any(configure: Configure) -> None:
    assert Policy(allow_any=True) == load_policy((), [configure("[backing]\nallow = any\n")])


def test_a_configuration_may_name_what_is_not_there_today(configure: Configure, tmp_path: Path) -> None:
    """A disk that is not plugged in must not break every command."""
    assert Policy(allow=("/no/such",)) == load_policy((), [configure("[backing]\nallow = /no/such\n")])


def test_words_of_all_places_add_up(configure: Configure, tmp_path: Path, home: Path) -> None:
    (tmp_path / "qcowfs.conf").write_text("[backing]\nallow = /system\n")
    (home / ".config" / "qcowfs").mkdir(parents=True)
    (home / ".config" / "qcowfs" / "config").write_text("[backing]\nallow = ~/images\n")

    assert Policy(allow=("/dev", "/system", f"{home}/images")) == load_policy(["/dev"])


def test_xdg_config_home_is_used_if_it_is_absolute(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "qcowfs").mkdir()
    (home / "qcowfs" / "config").write_text("[backing]\nallow = /a\n")
    monkeypatch.chdir(home.parent)

    monkeypatch.setenv("XDG_CONFIG_HOME", str(home))
    assert load_policy() == Policy(allow=("/a",))
    monkeypatch.setenv("XDG_CONFIG_HOME", "home")
    assert load_policy() == Policy()


@pytest.mark.parametrize("path", ["/no/such/file", "/dev/null/x"])
def test_a_configuration_that_is_not_there_allows_nothing(path: str) -> None:
    assert load_policy((), [path]) == Policy()


def test_a_configuration_that_may_not_be_read_allows_nothing(configure: Configure) -> None:
    path = configure("[backing]\nallow = any\n")
    os.chmod(path, 0)
    if os.geteuid() == 0:
        os.seteuid(65534)
    try:
        assert load_policy((), [path]) == Policy()
    finally:
        if os.getuid() == 0:
            os.seteuid(0)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: files of another user")
@pytest.mark.expect_warnings
def test_root_does_not_obey_another_users_configuration(configure: Configure, caplog: pytest.LogCaptureFixture) -> None:
    """`sudo` may leave HOME as it was."""
    path = configure("[backing]\nallow = any\n")
    os.chown(path, 65534, 65534)

    assert load_policy((), [path]) == Policy()
    assert [record.getMessage() for record in caplog.records] == [f"{path}: not used: it belongs to another user"]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("[backing]\nallow = images\n", "images: an absolute path, ~ or any was expected"),
        ("[backing]\nallow = /a:../b\n", r"../b: an absolute path, ~ or any was expected"),
        ("[backing]\nallow = /a\0b\n", "an absolute path, ~ or any was expected"),
        ("[backing]\nalow = /a\n", r"alow: only allow in [backing] is known"),
        ("[baking]\nallow = /a\n", r"[baking]: only allow in [backing] is known"),
        ("[DEFAULT]\nx = 1\n[backing]\nallow = /a\n", "x: only allow in [backing] is known"),
        ("allow = /a\n", "File contains no section headers."),
        ("[backing]\nallow = /a\nallow = /b\n", "already exists"),
        ("[backing]\n[backing]\n", "already exists"),
        ("[backing\n", "no section headers"),
        ("\x1b[31m\n", "no section headers"),
        ("# " + "x" * limits.MAX_CONFIGURATION, "it is too long"),
    ],
)
def test_a_configuration_that_cannot_be_understood_is_an_error(configure: Configure, content: str, why: str) -> None:
    """What is misspelt allows nothing, and somebody relies on it: better to say it."""
    path = configure(content)

    with pytest.raises(UsageError) as caught:
        load_policy((), [path])
    assert str(caught.value).startswith(f"{path}: cannot be used: ")
    assert why in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_configuration_that_is_not_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "config").write_bytes(b"[backing]\nallow = /\xff\n")

    with pytest.raises(UsageError, match="cannot be used: 'utf-8' codec"):
        load_policy((), [str(tmp_path / "config")])


def test_a_configuration_that_is_a_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Is a directory"):
        load_policy((), [str(tmp_path)])


@pytest.mark.timeout(5, method="signal")
def test_a_fifo_in_somebodys_home_does_not_stop_root(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config")

    assert load_policy((), [str(tmp_path / "config")]) == Policy()


def test_urls_are_words_too(home: Path, configure: Configure) -> None:
    configured = configure("[backing]\nallow = /srv:/more\n  https://h/images/\n  nbd://h:10809\n")
    found = load_policy(["s3://bucket/a"], [configured])

    assert ("/srv", "/more") == found.allow
    allowed = ["https://h/images/x", "nbd://h:10809/x", "s3://bucket/a/b"]
    refused = ["https://h/x", "https://h2/images/x", "nbd://h/x", "s3://bucket/ab", "https://h/images/../x"]
    assert [True] * 3 + [False] * 5 == [found.covers_url(parse_url(text)) for text in allowed + refused]


def test_any_covers_every_url() -> None:
    assert load_policy(["any"], []).covers_url(parse_url("https://h/x"))


def test_a_url_that_makes_no_sense_is_told() -> None:
    with pytest.raises(UsageError, match="--allow-backing https://h/a b: a URL with a space"):
        load_policy(["https://h/a b"], [])
