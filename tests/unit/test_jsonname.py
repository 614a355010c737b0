"""json: names as flat tables of options; R44, R61. Own fixtures; tests/oracle/test_chain.py asks what QEMU reads."""

from __future__ import annotations

from typing import Any

import pytest

from qcowfs import limits
from qcowfs.jsonname import parse


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{}", {}),
        ('{"a": 1, "b": "x", "c": true, "d": null, "e": [1]}', {"a": 1, "b": "x", "c": True, "d": None, "e": [1]}),
        ('{"a": {"b": {"c": 1}}}', {"a.b.c": 1}),
        ('{"a.b": 1, "a": {"c": 2}}', {"a.b": 1, "a.c": 2}),
        (' { "a" : {} } ', {}),
    ],
)
def test_r44_trees_become_flat(text: str, expected: dict[str, Any]) -> None:
    assert expected == parse(text.encode())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{'a': 'x'}", {"a": "x"}),
        ("""{'a': "x", "b": 'y'}""", {"a": "x", "b": "y"}),
        ("""{'a': 'it\\'s'}""", {"a": "it's"}),
        ("""{"a": "it\\'s"}""", {"a": "it's"}),
        ("""{'a': 'say "x"'}""", {"a": 'say "x"'}),
        ("""{'a': 'say \\"x\\"'}""", {"a": 'say "x"'}),
        ("""{"a": "it's"}""", {"a": "it's"}),
        ("""{'a': 'b\\\\'}""", {"a": "b\\"}),
        ("""{'a': '\\u0041'}""", {"a": "A"}),
        ("""{'a': '}{'}""", {"a": "}{"}),
    ],
)
def test_r44_strings_may_stand_in_single_quotes_as_in_qemu(text: str, expected: dict[str, str]) -> None:
    assert expected == parse(text.encode())


@pytest.mark.parametrize(
    "text", ["{'a': 'x}", "{'a': x'}", "{'a: 'x'}", "{a: 1}", "{'a': 'x\"}", "{\"a\": 'x\\'}", "{'a': 'b' 'c'}"]
)
def test_r44_quotes_that_do_not_match_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="line 1 column"):
        parse(text.encode())


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"1", b'"x"', b"null", b"{", b"{}}", b"{} {}", b"\xff", b'{"\xff": 1}', b'{"a": "\n"}']
)
def test_r44_what_is_no_object_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse(text)


@pytest.mark.parametrize(
    "text", ['{"a": 1, "a": 1}', '{"a": {"b": 1, "b": 2}}', '{"a.b": 1, "a": {"b": 2}}', '{"a": {"b": 1}, "a.b": 2}']
)
def test_r44_an_option_that_is_there_twice_is_refused(text: str) -> None:
    """Two readers could take two different ones, and the gate would judge another file than the one that is meant."""
    with pytest.raises(ValueError, match=r"^(a|b|a\.b) is there twice$"):
        parse(text.encode())


@pytest.mark.parametrize("escape", [r"\u0000", r"\ud800", r"\udc80", r"\udcff", r"\udfff"])
@pytest.mark.parametrize("form", ['{{"a": "x{}"}}', '{{"x{}": 1}}'])
def test_r44_what_no_file_can_be_called_is_refused(escape: str, form: str) -> None:
    """Python keeps bytes that are not UTF-8 as \\udc80 to \\udcff: an escape must not become such a byte."""
    with pytest.raises(ValueError, match="can be no file's name"):
        parse(form.format(escape).encode())


def test_r44_a_pair_of_surrogates_is_one_character() -> None:
    assert parse(rb'{"a": "\ud83d\ude00"}') == {"a": "\U0001f600"}


@pytest.mark.parametrize(("opening", "closing"), [('{"a":', "}"), ('{"a":[', "]}")])
def test_r61_depth_has_a_cap(opening: str, closing: str) -> None:
    times = limits.MAX_JSON_DEPTH // len(closing)

    assert len(parse((opening * times + "1" + closing * times).encode())) == 1
    with pytest.raises(ValueError, match="nested too deep"):
        parse((opening * (times + 1) + "1" + closing * (times + 1)).encode())


def test_r61_brackets_in_strings_are_not_depth() -> None:
    assert parse(b'{"a": "' + b"{[" * 1000 + b'"}') == {"a": "{[" * 1000}


@pytest.mark.timeout(5, method="signal")
@pytest.mark.parametrize("piece", [b"'", b'"', b"\\", b"'\\", b'"\\"', b"{", b"}", b"'\"", b'{"a":"'])
def test_r61_a_name_of_half_a_megabyte_is_refused_in_no_time(piece: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse(piece * (500_000 // len(piece)))
