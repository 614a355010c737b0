"""URLs: their parts, what is shown of them, and what lies beside what."""

from __future__ import annotations

import pytest

from qcowfs.source.url import is_url, parse_url


@pytest.mark.parametrize("name", ["a.qcow2", "/a//b.qcow2", "a:b", "nbd:host:1", "json:{}", "./http://x", "1://x", ""])
def test_a_path_is_no_url(name: str) -> None:
    assert not is_url(name)
    with pytest.raises(ValueError, match="not a URL"):
        parse_url(name)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("iscsi://me%secret@host:3260/iqn.x:y/1", "iscsi://...@host:3260/iqn.x:y/1"),
        ("https://me:secret@host/a.qcow2", "https://...@host/a.qcow2"),
        ("https://host/a.qcow2?X-Amz-Signature=secret", "https://host/a.qcow2?X-Amz-Signature=..."),
        ("nbd+unix:///disk?socket=/run/a.sock", "nbd+unix:///disk?socket=/run/a.sock"),
    ],
)
def test_no_secret_is_shown(text: str, shown: str) -> None:
    assert shown == parse_url(text).shown


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("http://host/a/b.qcow2?key=x", "b.qcow2"),
        ("s3://bucket/a/b.qcow2", "b.qcow2"),
        ("iscsi://host/iqn.x/7", "lun7"),
        ("nbd://host:10809", "host:10809"),
    ],
)
def test_it_has_a_name_to_show(text: str, name: str) -> None:
    assert name == parse_url(text).name


@pytest.mark.parametrize(
    ("text", "name", "found"),
    [
        ("http://h/a/top.qcow2?key=x", "base.qcow2", "http://h/a/base.qcow2"),
        ("http://u:p@h/a/top.qcow2", "sub/base.qcow2", "http://u:p@h/a/sub/base.qcow2"),
        ("nbd+unix:///top?socket=/run/s", "base", "nbd+unix:///base?socket=/run/s"),
    ],
)
def test_a_relative_name_leads_beside_it(text: str, name: str, found: str) -> None:
    assert found == parse_url(text).beside(name).text


@pytest.mark.parametrize(
    ("text", "folder", "below"),
    [
        ("http://h/a/b", "http://h/a", True),
        ("http://h/a/b", "http://h/a/", True),
        ("http://h/a/b", "http://h", True),
        ("http://u:p@h/a/b", "http://h/a", True),
        ("http://h/ab", "http://h/a", False),
        ("http://h2/a/b", "http://h/a", False),
        ("https://h/a/b", "http://h/a", False),
        ("http://h/a/../b", "http://h/a", False),
        ("http://h/a/%2e%2e/b", "http://h/a", False),
        ("nbd+unix:///b?socket=/x", "nbd+unix:///?socket=/y", False),
        ("nbd+unix:///b?socket=/x", "nbd+unix:///?socket=/x", True),
    ],
)
def test_what_lies_below_what(text: str, folder: str, below: bool) -> None:
    assert below is parse_url(text).is_below(parse_url(folder))
