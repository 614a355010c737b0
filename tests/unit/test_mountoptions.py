"""The words after -o: strict for ours, patient with those of mount(8)."""

from __future__ import annotations

import pytest

from qcowfs.errors import UsageError
from qcowfs.mountoptions import KNOWN, MountOptions, parse


def test_no_words_are_the_defaults() -> None:
    assert MountOptions() == parse([]) == parse([""]) == parse([",,"])


@pytest.mark.parametrize(
    ("word", "field"),
    [
        ("allow_other", "allow_other"),
        ("allow_root", "allow_root"),
        ("auto_unmount", "auto_unmount"),
        ("live", "live"),
        ("no_lock", "no_lock"),
        ("nolock", "no_lock"),
        ("nonempty", "nonempty"),
        ("rw", "rw"),
    ],
)
def test_a_flag_sets_its_field_and_no_other(word: str, field: str) -> None:
    assert MountOptions(**{field: True}) == parse([word])


def test_words_come_in_one_argument_or_in_several() -> None:
    expected = MountOptions(live=True, nonempty=True, auto_unmount=True)

    assert expected == parse(["live,nonempty", "auto_unmount"])


def test_values_are_kept_and_directories_add_up() -> None:
    options = parse(["allow_backing=/a,log_file=/l", "allow_backing=/b=c,image_format=raw"])

    assert options.allow_backing == ("/a", "/b=c")
    assert options.log_file == "/l"
    assert options.image_format == "raw"


@pytest.mark.parametrize(
    "text", [r"allow_backing=/a\,b,live", 'allow_backing="/a,b",live', 'allow_backing=/a","b,live']
)
def test_a_comma_in_a_value_is_escaped_or_quoted(text: str) -> None:
    assert MountOptions(allow_backing=("/a,b",), live=True) == parse([text])


def test_a_backslash_escapes_itself() -> None:
    assert parse([r"allow_backing=/a\\b"]).allow_backing == ("/a\\b",)


@pytest.mark.parametrize(
    "text",
    [
        "rw,dev,suid",
        "ro,noexec,nosuid,nodev",
        "defaults,noauto,user,nofail,_netdev,relatime",
        "x-systemd.automount,x-gvfs-show,X-mount.mkdir,comment=a b,user=bob",
        "noatime,nodiratime,lazytime,sync,group,owner,users,exec,uhelper=x",
    ],
)
def test_what_mount_adds_is_accepted_and_means_nothing(text: str) -> None:
    options = parse([text])

    assert MountOptions(rw=text.startswith("rw")) == options


def test_the_last_of_ro_and_rw_wins() -> None:
    assert parse(["rw,ro"]).rw is False
    assert parse(["ro,rw"]).rw is True


@pytest.mark.parametrize(
    "word", ["foo", "allow_othr", "loop", "remount", "live=1", "allow_other=", "max_read=1", "ro=x"]
)
def test_an_unknown_word_is_an_error_that_lists_the_known_ones(word: str) -> None:
    with pytest.raises(UsageError) as failure:
        parse([f"ro,{word},live"])

    assert f"'{word}'" in str(failure.value)
    assert failure.value.hint is not None
    assert all(known in failure.value.hint for known in KNOWN)
    assert failure.value.exit_code == 2


def test_sloppy_ignores_unknown_words_only() -> None:
    assert MountOptions(live=True) == parse(["foo,live,bar=baz"], sloppy=True)


@pytest.mark.parametrize("text", ["allow_backing", "log_file=", "image_format="])
def test_a_missing_value_is_an_error(text: str) -> None:
    with pytest.raises(UsageError):
        parse([text])


def test_allow_other_and_allow_root_exclude_each_other() -> None:
    with pytest.raises(UsageError, match="exclude"):
        parse(["allow_other,allow_root"])


def test_an_unknown_word_cannot_write_on_the_terminal() -> None:
    with pytest.raises(UsageError) as failure:
        parse(["\x1b[2J"])

    assert "\x1b" not in str(failure.value)


def test_every_known_word_is_accepted() -> None:
    for known in KNOWN:
        if known != "allow_root":
            value = {"cache_size": "=4M"}.get(known.split("=")[0], "=/x") if "=" in known else ""
            assert parse([known.split("=")[0] + value]) is not None
