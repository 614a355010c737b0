"""Frozen classes are what `dataclasses` makes, and a comparison of blocks starts without large modules."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest

from qcowfs import frozen

SLOW = ("dataclasses", "inspect", "json", "difflib", "shutil", "configparser", "shlex", "base64", "datetime", "hashlib")


class _Both:
    """The same class by both."""

    def __init__(self, *, kw_only: bool) -> None:
        self.made = [self._class(room, kw_only=kw_only) for room in (frozen, dataclasses)]

    @staticmethod
    def _class(room: Any, *, kw_only: bool) -> Any:
        namespace = {
            "__annotations__": {"first": "int", "second": "str", "third": "list[int]"},
            "__qualname__": "Made",
            "__module__": __name__,
            "second": "two",
            "third": room.field(default_factory=list),
            "double": property(lambda self: 2 * self.first),
        }
        return room.dataclass(frozen=True, slots=True, kw_only=kw_only)(type("Made", (), namespace))


@pytest.mark.parametrize("words", [{"first": 1}, {"first": 2, "second": "b"}, {"first": 3, "third": [4]}])
def test_objects_are_those_of_dataclasses(words: dict[str, Any]) -> None:
    ours, theirs = (made(**words) for made in _Both(kw_only=True).made)

    for name in ("first", "second", "third", "double"):
        assert getattr(theirs, name) == getattr(ours, name)
    assert repr(theirs) == repr(ours)
    assert dataclasses.replace(ours, first=7) == type(ours)(**words | {"first": 7})
    assert type(ours)(**words) == ours != type(ours)(first=9)
    assert ours != theirs
    assert type(ours)(first=1).third is not type(ours)(first=1).third
    with pytest.raises(AttributeError):
        ours.first = 5
    with pytest.raises(AttributeError):
        del ours.first
    with pytest.raises(AttributeError):
        ours.fourth = 5
    with pytest.raises(TypeError):
        type(ours)()
    with pytest.raises(TypeError):
        type(ours)(1)


def test_equal_ones_are_one_key() -> None:
    @frozen.dataclass(frozen=True, slots=True)
    class Made:
        only: str

    assert {Made("a"): 1} == {Made(only="a"): 1}
    assert len({Made("a"), Made("b"), Made("a")}) == 2


def test_a_comparison_of_blocks_does_not_import_what_it_does_not_need() -> None:
    code = "import sys; from qcowfs import cli; cli.build_parser(['diff']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True, cwd=_root())

    assert not {*SLOW} & {*done.stdout.split()}


def _root() -> str:
    return __file__.rpartition("/tests/")[0]
