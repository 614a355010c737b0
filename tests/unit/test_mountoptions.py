"""The words after -o: strict for ours, patient with those of mount(8)."""

from __future__ import annotations

import pytest

from qcowfs.errors import UsageError
from qcowfs.mountoptions import KNOWN, MountOptions, cache_size, parse


def test_no_words_are_the_defaults() -> None:
    assert MountOptions() == parse([]) == parse([""]) == parse([",,"])


@pytest.mark.parametrize(
    ("word", "field"),
    [
        ("allow_other", "allow_other"),
        ("allow_root", "allow_root"),
        ("auto_unmount", "auto_unmount"),
        ("live", "live"),
        ("no_data_plane", "no_data_plane"),
        ("norecovery", "norecovery"),
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


EXAMPLES = {"SIZE": "8M", "N": "1", "OCTAL": "22", "raw|contain": "contain"}


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
        word, _, value = known.partition("=")
        if word != "allow_root":
            assert parse([f"{word}={EXAMPLES.get(value, '/x')}" if value else word]) is not None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1M", 1 << 20),
        ("1048576", 1 << 20),
        ("1024K", 1 << 20),
        ("48m", 48 << 20),
        ("48MiB", 48 << 20),
        ("3GiB", 3 << 30),
        ("1024G", 1 << 40),
    ],
)
def test_a_size_of_the_cache_is_what_qemu_img_would_take(text: str, expected: int) -> None:
    assert expected == cache_size(text) == parse([f"cache_size={text}"]).cache_size


@pytest.mark.parametrize(
    "text",
    [
        *("0", "1048575", "1023K", "1025G", "999999999999G", "9999999999999", "-1M", "+1M", "1.5M", "0x100000"),
        *("", " 1M", "1 M", "1M ", "1Mi", "1MB", "1T", "M", "\u0664M", "1e9", "inf"),
    ],
)
def test_a_size_that_no_cache_can_have_is_an_error_with_a_hint(text: str) -> None:
    with pytest.raises(UsageError) as failure:
        cache_size(text)

    assert f"'{text}'" in str(failure.value)
    assert failure.value.hint == "from 1M on, with K, M or G behind it"
    assert failure.value.exit_code == 2


@pytest.mark.parametrize(
    ("word", "key", "expected"),
    [
        ("uid=0", "uid", 0),
        ("gid=4294967294", "gid", 4294967294),
        ("umask=027", "umask", 0o27),
        ("umask=777", "umask", 0o777),
        ("symlinks=contain", "symlinks", "contain"),
        ("symlinks=raw", "symlinks", "raw"),
    ],
)
def test_how_the_files_inside_are_shown(word: str, key: str, expected: object) -> None:
    assert getattr(parse([word]), key) == expected


@pytest.mark.parametrize(
    "word",
    ["uid=", "uid=-1", "uid=4294967295", "uid=root", "gid=1e3", "gid= 1", "umask=8", "umask=1000", "symlinks=follow"],
)
def test_what_is_no_owner_or_mask_or_choice_is_refused(word: str) -> None:
    with pytest.raises(UsageError, match=f"the mount option {word.partition('=')[0]} "):
        parse([word])
