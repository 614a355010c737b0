"""File names inside images: which local path they mean, and which of them mean nothing. Own fixtures, R42 to R44."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qcowfs import limits
from qcowfs.errors import CorruptImage, QcowfsError, UnsupportedImage
from qcowfs.filename import FileName, parse, parse_data_file_name

IMAGE = "/images/top.qcow2"


def parse_json(tree: Any) -> FileName:
    return parse(b"json:" + json.dumps(tree).encode(), IMAGE)


@pytest.mark.parametrize(
    "name",
    ["base.raw", "/abs/base.raw", "../x/base.raw", "./a:b.qcow2", "dir/a:b", "/dev/vg:0", "json", "a b\n", "JSON", "."],
)
def test_r41_r42_a_name_without_a_protocol_is_a_path_as_it_stands(name: str) -> None:
    assert FileName(path=name) == parse(name.encode(), IMAGE)


@pytest.mark.parametrize("name", [b"a:b.qcow2", b"ftp://host/x", b"nbd:unix:", b"nbd:host", b"rbd:pool/x", b":x"])
def test_r42_r43_what_stands_before_the_first_colon_is_a_protocol(name: bytes) -> None:
    with pytest.raises(UnsupportedImage, match=r"the protocol .* is not supported") as caught:
        parse(name, IMAGE)

    assert f"{IMAGE}: it names {name.decode()}: " in str(caught.value)


@pytest.mark.parametrize("protocol", ["file", "host_device"])
@pytest.mark.parametrize("path", ["base.raw", "/abs/base.raw", "a:b.qcow2", "//x"])
def test_r42_r43_local_protocols_are_paths_from_the_working_directory(protocol: str, path: str) -> None:
    assert FileName(path=path, relative_to_image=False) == parse(f"{protocol}:{path}".encode(), IMAGE)


@pytest.mark.parametrize("name", ["FILE:x", "File:x", "JSON:{}", "files:x"])
def test_r42_protocols_are_spelt_exactly(name: str) -> None:
    with pytest.raises(UnsupportedImage):
        parse(name.encode(), IMAGE)


def test_a_name_that_is_not_utf_8_keeps_its_bytes() -> None:
    assert parse(b"\xff\xfe/base", IMAGE).path.encode("utf-8", "surrogateescape") == b"\xff\xfe/base"


@pytest.mark.parametrize(
    "name", [b"\0", b"a\0b", b"file:a\0", rb'json:{"file.filename":"a\u0000b"}', b'json:{"file.filename":"a\0b"}']
)
def test_no_file_name_has_a_nul_byte(name: bytes) -> None:
    with pytest.raises(CorruptImage, match=r"bad (file|json:) name in the image"):
        parse(name, IMAGE)


@pytest.mark.parametrize("escape", [r"\ud800", r"\udfff", r"\udc7f"])
def test_half_of_a_surrogate_pair_is_no_file_name(escape: str) -> None:
    """JSON can write it; no file can have it."""
    with pytest.raises(CorruptImage, match="can be no file's name"):
        parse(f'json:{{"file.filename":"/{escape}"}}'.encode(), IMAGE)


@pytest.mark.parametrize(
    "tree",
    [
        {"driver": "qcow2", "file": {"driver": "file", "filename": "x"}},
        {"driver": "qcow2", "file": {"filename": "x"}},
        {"driver": "qcow2", "file.filename": "x"},
        {"driver": "qcow2", "file.driver": "file", "file.filename": "x"},
        {"driver": "qcow2", "file": {"driver": "file"}, "file.filename": "x"},
        {"driver": "qcow2", "file": {"driver": "host_device", "filename": "x"}},
    ],
)
def test_r44_nested_and_flat_keys_mean_the_same(tree: Any) -> None:
    assert FileName(path="x", relative_to_image=False, format="qcow2") == parse_json(tree)


@pytest.mark.parametrize("driver", ["file", "host_device"])
def test_r44_a_protocol_alone_is_the_bytes_as_they_are(driver: str) -> None:
    """QEMU puts no format above it, so a qcow2 file is raw then: tests/oracle/test_chain.py asks it."""
    assert FileName(path="x", relative_to_image=False, format="raw") == parse_json({"driver": driver, "filename": "x"})


def test_r44_no_driver_at_all_says_nothing_about_the_format() -> None:
    assert parse_json({"file": {"filename": "x"}}).format is None


@pytest.mark.parametrize("number", [0, 512, 1 << 20, limits.MAX_VIRTUAL_SIZE])
def test_r44_windows_of_the_raw_driver_are_numbers_or_digits(number: int) -> None:
    wanted = FileName(path="x", relative_to_image=False, format="raw", offset=number, size=number)

    for spelt in (number, str(number)):
        assert wanted == parse_json({"driver": "raw", "offset": spelt, "size": spelt, "file.filename": "x"})


@pytest.mark.parametrize("tree", [{}, {"offset": 5}, {"size": 1024}])
def test_r44_a_window_may_have_one_end(tree: dict[str, int]) -> None:
    found = parse_json({"driver": "raw", "file.filename": "x", **tree})

    assert (tree.get("offset", 0), tree.get("size")) == (found.offset, found.size)


@pytest.mark.parametrize("key", ["offset", "size"])
@pytest.mark.parametrize(
    "value",
    [
        -1,
        limits.MAX_VIRTUAL_SIZE + 1,
        10**25,
        "-1",
        "1M",
        "",
        " 1",
        "0x10",
        "\u0661",
        1.5,
        1.0,
        True,
        [1],
        "0" * 20 + "512",
    ],
)
def test_r44_a_window_that_is_no_number_is_refused_and_never_guessed(key: str, value: Any) -> None:
    """Digits that are cut would show other data: so long a number is refused."""
    with pytest.raises(CorruptImage, match=f"{key} is "):
        parse_json({"driver": "raw", key: value, "file.filename": "x"})


@pytest.mark.parametrize("key", ["offset", "size"])
@pytest.mark.parametrize("driver", ["qcow2", "qcow", None])
def test_r44_only_the_raw_driver_has_a_window(key: str, driver: str | None) -> None:
    with pytest.raises(UnsupportedImage, match=f"the option {key} is not among those that are known"):
        parse_json({"file.filename": "x", key: 512} | ({"driver": driver} if driver else {}))


@pytest.mark.parametrize("driver", ["luks", "rbd", "ftp", "null-co", "fat", "RAW", "", 1, ["raw"], False])
def test_r44_unknown_drivers_are_refused(driver: Any) -> None:
    with pytest.raises(UnsupportedImage, match=r"the driver .* is not among those that are known"):
        parse_json({"driver": driver, "file.filename": "x"})
    with pytest.raises(UnsupportedImage, match=r"the driver .* is not among those that are known"):
        parse_json({"driver": "raw", "file": {"driver": driver, "filename": "x"}})


@pytest.mark.parametrize(
    "option", ["read-only", "backing", "backing.cache", "file.locking", "file.x.y", "cache", "", "."]
)
def test_r44_unknown_options_are_refused(option: str) -> None:
    """What they would change cannot be known, so nothing is shown."""
    with pytest.raises(UnsupportedImage, match=r"the option .* is not among those that are known"):
        parse_json({"driver": "qcow2", "file.filename": "x", option: "y"})


@pytest.mark.parametrize(
    "text",
    [
        '{"file.filename": "a", "file.filename": "b"}',
        '{"file.filename": "a", "file": {"filename": "b"}}',
        '{"file": {"filename": "b"}, "file.filename": "a"}',
        '{"file": {"filename": "b", "filename": "a"}}',
        '{"driver": "raw", "driver": "qcow2", "file.filename": "a"}',
    ],
)
def test_r44_an_option_that_is_there_twice_is_refused(text: str) -> None:
    with pytest.raises(CorruptImage, match=r"is there twice"):
        parse(b"json:" + text.encode(), IMAGE)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "}",
        "[]",
        "null",
        "1",
        '"x"',
        "{}",
        '{"file.filename": 1}',
        '{"file": "x"}',
        '{"file": ["x"]}',
        "{'a': 1}",
    ],
)
def test_r44_what_is_no_object_with_a_file_name_is_refused(text: str) -> None:
    with pytest.raises(QcowfsError, match=r"json: name") as caught:
        parse(b"json:" + text.encode(), IMAGE)

    assert caught.type is CorruptImage


@pytest.mark.parametrize("size", [1, 511, 513])
def test_r44_a_window_is_whole_sectors_but_begins_anywhere(size: int) -> None:
    """As QEMU has it: "Specified size is not multiple of 512"."""
    with pytest.raises(CorruptImage, match=f"size is {size}, a multiple of 512 was expected"):
        parse_json({"driver": "raw", "offset": 3, "size": size, "file.filename": "x"})


def nested(depth: int) -> bytes:
    """A json: name with one object inside the other, `depth` of them."""
    return b"json:" + b'{"a":' * (depth - 1) + b'{"a":1}' + b"}" * (depth - 1)


def test_r61_json_names_nest_up_to_a_cap() -> None:
    with pytest.raises(CorruptImage, match=r"no file.filename"):
        parse(nested(limits.MAX_JSON_DEPTH), IMAGE)
    with pytest.raises(CorruptImage, match="nested too deep"):
        parse(nested(limits.MAX_JSON_DEPTH + 1), IMAGE)


@pytest.mark.parametrize("bracket", [b"{", b"[", b'{"a":', b"[{", b'{"a":['])
def test_r61_json_10000_deep_is_a_named_error(bracket: bytes) -> None:
    with pytest.raises(CorruptImage, match="nested too deep"):
        parse(b"json:" + bracket * 10_000, IMAGE)


@pytest.mark.parametrize("value", ["9" * 5000, "1e400", "-1e400", "NaN", "Infinity", "1e-400"])
def test_r61_numbers_that_python_or_json_cannot_hold_are_named_errors(value: str) -> None:
    with pytest.raises(CorruptImage, match="bad json: name"):
        parse(f'json:{{"driver":"raw","file.filename":"x","offset":{value}}}'.encode(), IMAGE)


def test_r61_a_huge_json_name_is_read_in_no_time() -> None:
    tree = {f"key{number}": "v" for number in range(100_000)}

    with pytest.raises(UnsupportedImage, match="the option key0 "):
        parse_json({"file.filename": "x", **tree})


@pytest.mark.parametrize(
    "name", [b"json:\xff", b'json:{"\xff":1}', b'json:{"driver":"\x1b[31m","file.filename":"x"}', b"\x1b[1m:x"]
)
def test_no_message_carries_raw_bytes_to_the_terminal(name: bytes) -> None:
    with pytest.raises(QcowfsError) as caught:
        parse(name, IMAGE)

    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("name", "url"),
    [
        ("https://h/x.qcow2", "https://h/x.qcow2"),
        ("iscsi://h:3260/iqn.2026-11.x:y/1", "iscsi://h:3260/iqn.2026-11.x:y/1"),
        ("nbd:host:10809", "nbd://host:10809/"),
        ("nbd:[::1]:10809:exportname=a b", "nbd://[::1]:10809/a%20b"),
        ("nbd:unix:/run/x.sock:exportname=disk", "nbd+unix:///disk?socket=/run/x.sock"),
    ],
)
def test_names_on_servers_are_urls(name: str, url: str) -> None:
    found = parse(name.encode(), IMAGE)

    assert ("", url, False) == (found.path, found.url and found.url.text, found.relative_to_image)


@pytest.mark.parametrize(
    ("server", "url"),
    [
        ({"driver": "nbd", "server.type": "unix", "server.path": "/s", "export": "e"}, "nbd+unix:///e?socket=/s"),
        ({"driver": "nbd", "server": {"type": "inet", "host": "::1", "port": "7"}}, "nbd://[::1]:7/"),
        ({"driver": "nbd", "host": "h", "port": 10809, "export": "e"}, "nbd://h:10809/e"),
        ({"driver": "nbd", "path": "/s"}, "nbd+unix:///?socket=/s"),
        ({"driver": "https", "url": "https://h/x", "readahead": 1, "timeout": 5}, "https://h/x"),
        (
            {"driver": "iscsi", "transport": "tcp", "portal": "h:3260", "target": "iqn.x", "lun": 2, "user": "u"},
            "iscsi://u@h:3260/iqn.x/2",
        ),
        (
            {"driver": "iscsi", "portal": "h", "target": "t", "lun": "1", "user": "u", "password-secret": "sec0"},
            "iscsi://u@h/t/1",
        ),
        ({"driver": "iscsi", "portal": "h", "target": "iqn.x"}, "iscsi://h/iqn.x/0"),
    ],
)
def test_r44_network_drivers_are_urls_with_a_format_or_alone(server: dict[str, Any], url: str) -> None:
    above = parse_json({"driver": "qcow2", "file": server})
    alone = parse_json(server)

    assert ("qcow2", url) == (above.format, above.url and above.url.text)
    assert ("raw", url) == (alone.format, alone.url and alone.url.text)


def test_a_json_name_says_what_the_backing_file_is_and_that_of_it() -> None:
    """As QEMU writes it where a disk was put together by hand: each level overrides what a header says."""
    base = {"driver": "raw", "size": 1024, "file": {"driver": "file", "filename": "/base"}}
    middle = {"driver": "qcow2", "file": {"driver": "nbd", "path": "/s"}, "backing": base}
    found = parse_json({"driver": "qcow2", "file.filename": "/x", "backing": middle})

    assert ("/x", "qcow2") == (found.path, found.format)
    assert found.backing
    assert ("qcow2", "nbd+unix:///?socket=/s") == (found.backing.format, found.backing.url and found.backing.url.text)
    assert FileName(path="/base", relative_to_image=False, format="raw", size=1024) == found.backing.backing


def test_a_backing_file_without_a_place_is_the_one_of_the_header_read_in_another_way() -> None:
    told = parse_json({"driver": "qcow2", "file.filename": "/x", "backing.driver": "raw"}).backing
    deeper = parse_json({"file.filename": "/x", "backing": {"driver": "qcow2", "backing": None}}).backing

    assert told
    assert FileName(path="base", format="raw") == told.over(parse(b"base", IMAGE))
    assert deeper
    assert FileName(path="base", format="qcow2", alone=True) == deeper.over(parse(b"base", IMAGE))


@pytest.mark.parametrize(
    ("tree", "why"),
    [
        ({"backing": "node"}, "the option backing is not"),
        ({"backing.driver": "luks"}, "the driver luks is not"),
        ({"backing.cache": "x", "backing.driver": "raw"}, "the option backing.cache is not"),
        ({"backing.file.driver": "null-co"}, "the driver null-co is not"),
        ({"backing.backing.file.x": "y", "backing.backing.file.filename": "z"}, "the option backing.backing.file.x is"),
        ({"backing": None, "backing.driver": "raw"}, "the option backing is not"),
        ({"driver": "raw", "backing.file.filename": "y"}, "the option backing is not"),
        (
            {"backing": {"driver": "nbd", "path": "/s", "backing": {"driver": "raw"}}},
            "the option backing.backing is not",
        ),
        ({"backing.driver": "raw", "backing.size": 5}, "backing.size is 5, a multiple of 512 was expected"),
        ({f"{'backing.' * 200}driver": "raw"}, "nested too deep"),
    ],
)
def test_of_a_backing_file_in_a_json_name_nothing_is_guessed(tree: dict[str, Any], why: str) -> None:
    with pytest.raises(QcowfsError, match=why):
        parse_json({"driver": "qcow2", "file.filename": "/x", **tree})


@pytest.mark.parametrize(
    ("server", "why"),
    [
        ({"driver": "nbd"}, "an NBD server of the type None"),
        ({"driver": "nbd", "server.type": "vsock", "server.cid": 3}, "an NBD server of the type vsock"),
        ({"driver": "nbd", "server.type": "unix"}, "no server.path"),
        ({"driver": "iscsi", "portal": "h"}, "no target"),
        ({"driver": "iscsi", "transport": "iser", "portal": "h", "target": "t"}, "a transport other than tcp"),
        ({"driver": "https"}, "no url"),
        ({"driver": "nbd", "server.type": "inet", "server.host": "h", "tls-creds": "x"}, "the option file.tls-creds"),
        ({"driver": "https", "url": "https://h/x", "sslverify": False}, "the option file.sslverify"),
        ({"driver": "https", "url": "https://h/x", "password-secret": "x"}, "the option file.password-secret"),
        ({"driver": "https", "url": "https://h/a b"}, "a URL with a space"),
        ({"driver": "https", "url": "file:///etc/passwd"}, "the protocol file is not supported"),
    ],
)
def test_r44_network_drivers_say_what_is_missing_or_not_understood(server: dict[str, Any], why: str) -> None:
    with pytest.raises(QcowfsError, match=why):
        parse_json(server)


def test_a_password_in_a_name_is_not_told() -> None:
    with pytest.raises(UnsupportedImage) as caught:
        parse(b"ftp://me:secret@host/x", IMAGE)

    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("name", ["json:{}", "nbd:h:1", "file:/x", "file:///x"])
def test_a_data_file_has_a_plain_name_or_a_url(name: str) -> None:
    with pytest.raises(UnsupportedImage, match="a data file has a plain name or a URL"):
        parse_data_file_name(name.encode(), IMAGE)


@pytest.mark.parametrize("name", [b"file://[x", b"ftp://me:secret@[x"])
def test_a_name_that_is_no_url_is_a_named_error(name: bytes) -> None:
    for parser in (parse, parse_data_file_name):
        if not name.startswith(b"file") or parser is parse_data_file_name:
            with pytest.raises(QcowfsError) as caught:
                parser(name, IMAGE)
            assert "secret" not in str(caught.value)


def test_a_data_file_may_be_a_url() -> None:
    found = parse_data_file_name(b"https://h/x.raw", IMAGE).url

    assert found
    assert found.text == "https://h/x.raw"
