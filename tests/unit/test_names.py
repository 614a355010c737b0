"""The names of points: escaping, room, duplicates, reserved words. Row R56, and qcowfs-layout(7)."""

from __future__ import annotations

import random

import pytest

from qcowfs.vfs import names
from tests.support.points import active, backing, layer, snapshot


def named(*raw: bytes) -> tuple[str, ...]:
    """Return the names of snapshots called `raw`, with the ids 1, 2, ..."""
    points = [snapshot(name, b"%d" % (place + 1), ordinal=place) for place, name in enumerate(raw)]
    return names.assign([active(), *points])[1:]


def test_the_active_state_is_current() -> None:
    assert names.assign([active()]) == ("current",)


def test_snapshots_of_the_image_carry_their_own_name() -> None:
    assert named(b"before-upgrade", b"monday") == ("before-upgrade", "monday")


def test_layers_carry_their_stem_and_their_snapshots_follow_an_at_sign() -> None:
    points = [active(), backing(1, "/images/data.qcow2"), snapshot(b"s", of=layer(1, "/images/data.qcow2"))]

    assert names.assign(points) == ("current", "data", "data@s")


@pytest.mark.parametrize(
    ("path", "stem"),
    [
        ("/images/data.qcow2", "data"),
        ("/images/data.tar.gz", "data.tar"),
        ("/dev/vg/root", "root"),
        ("/images/.hidden", ".hidden"),
        ("/images/caf\udce9.img", "caf%E9"),
        ("/images/current.img", "current#layer1"),
        ("/images/latest.img", "latest#layer1"),
    ],
)
def test_the_stem_is_the_file_name_without_its_last_extension(path: str, stem: str) -> None:
    assert names.assign([active(), backing(1, path)]) == ("current", stem)


def test_layers_with_equal_stems_are_told_apart_and_so_are_their_snapshots() -> None:
    one, two = "/a/data.qcow2", "/b/data.raw"
    points = [
        active(),
        backing(1, one),
        snapshot(b"s", of=layer(1, one)),
        backing(2, two),
        snapshot(b"s", of=layer(2, two)),
    ]

    assert names.assign(points)[1:] == ("data#layer1", "data#layer1@s", "data#layer2", "data#layer2@s")


@pytest.mark.parametrize(
    ("raw", "escaped"),
    [
        (b"plain name", "plain name"),
        (b"two/../x y", "two%2F..%2Fx y"),
        (b".", "%2E"),
        (b"..", "%2E%2E"),
        (b"...", "..."),
        (b".hidden", ".hidden"),
        (b"100%", "100%25"),
        (b"a\nb\x00c\x7f", "a%0Ab%00c%7F"),
        ("b\N{LATIN SMALL LETTER E WITH ACUTE}".encode(), "b\N{LATIN SMALL LETTER E WITH ACUTE}"),
        (b"b\xe9", "b%E9"),
        ("\N{CONTROL SEQUENCE INTRODUCER}".encode(), "%C2%9B"),
        (b"\xed\xa0\x80", "%ED%A0%80"),
        (b"#@~", "#@~"),
    ],
)
def test_r56_what_a_file_name_cannot_hold_is_escaped(raw: bytes, escaped: str) -> None:
    assert named(raw) == (escaped,)


def test_escaping_keeps_different_names_different() -> None:
    assert named(b"a/b", b"a%2Fb") == ("a%2Fb", "a%252Fb")


def test_r56_every_member_of_a_group_of_equal_names_gets_its_id() -> None:
    assert named(b"one", b"two", b"one") == ("one#1", "two", "one#3")


def test_r56_a_name_equal_to_another_snapshots_id_needs_nothing() -> None:
    assert named(b"2", b"x") == ("2", "x")


def test_r56_an_empty_name_is_its_id() -> None:
    assert named(b"", b"x") == ("#1", "x")


def test_an_empty_name_in_a_layer_is_its_id_after_the_stem() -> None:
    points = [active(), backing(1, "/data.qcow2"), snapshot(b"", b"7", of=layer(1, "/data.qcow2"))]

    assert names.assign(points)[2] == "data@#7"


@pytest.mark.parametrize("raw", [b"current", b"latest", b"current.raw", b"latest.raw"])
def test_reserved_names_get_their_id(raw: bytes) -> None:
    assert named(raw) == (f"{raw.decode()}#1",)


def test_a_name_that_is_anothers_file_gets_its_id() -> None:
    assert named(b"a", b"a.raw") == ("a", "a.raw#2")


def test_a_name_that_ends_in_raw_needs_nothing_by_itself() -> None:
    assert named(b"a.raw") == ("a.raw",)


def test_a_name_made_to_look_like_a_numbered_one_is_told_apart() -> None:
    found = named(b"a", b"a", b"a#1")

    assert found == ("a#1~1", "a#2", "a#1~3")


def test_equal_names_with_equal_ids_are_told_apart_by_their_place() -> None:
    points = [active(), snapshot(b"a", b"1"), snapshot(b"a", b"1"), snapshot(b"a", b"1")]

    assert names.assign(points)[1:] == ("a#1~1", "a#1~2", "a#1~3")


@pytest.mark.parametrize("length", [250, 251])
def test_names_that_fit_are_not_cut(length: int) -> None:
    assert named(b"x" * length) == ("x" * length,)


@pytest.mark.parametrize("length", [252, 255, 4096, 65535])
def test_r56_long_names_are_cut_and_keep_a_hash_of_all_their_bytes(length: int) -> None:
    one, two = named(b"x" * length, b"x" * (length - 1) + b"y")

    assert len(one) == len(two) == 251
    assert one.startswith("x" * 242 + "~")
    assert one != two


@pytest.mark.parametrize("character", ["\N{LATIN SMALL LETTER E WITH ACUTE}", "\N{SNOWMAN}", "\N{PILE OF POO}", "%"])
def test_long_names_are_cut_between_characters_and_escapes(character: str) -> None:
    for shift in range(4):
        (name,) = named(b"x" * shift + character.encode() * 300)
        whole = "%25" if character == "%" else character
        assert len(name.encode()) <= 251
        assert name[shift:-9].replace(whole, "") == ""


def test_a_long_name_with_a_long_id_still_fits() -> None:
    points = [active(), snapshot(b"n" * 65535, b"1" * 65535), snapshot(b"n" * 65535, b"2" * 65535)]

    found = names.assign(points)[1:]

    assert len(set(found)) == 2
    assert all(len(name) <= 251 for name in found)


def test_names_do_not_depend_on_the_run() -> None:
    raw = (b"a", b"a", b"\xff" * 300, b"", b"latest")

    assert named(*raw) == named(*raw)


HOSTILE = [
    *(b"a", b"a.raw", b"a#1", b"a#2", b"a#1~1", b"a#1~2", b"a.raw#3", b"", b"#1", b"#2", b"current", b"latest"),
    *(b"current.raw", b"a.raw.raw", b"data", b"data@a", b"data@", b"data#layer1", b"." * 2, b"%2E%2E", b"x" * 300),
    *(b"x" * 242 + b"~00000000", b"~1", b"/", b"%2F", b"\xff", b"%FF"),
]


@pytest.mark.parametrize("seed", range(50))
def test_any_mix_of_names_gives_disjoint_file_names_that_fit(seed: int) -> None:
    dice = random.Random(seed)
    points = [active()]
    for depth in range(3):
        path = dice.choice(["/a/data.qcow2", "/b/data.raw", "/c/current.img", "/d/data#layer1.x"])
        of = layer(depth, path)
        if depth:
            points.append(backing(depth, path))
        for place in range(dice.randrange(30)):
            points.append(snapshot(dice.choice(HOSTILE), b"%d" % dice.randrange(4), of=of, ordinal=place))

    found = names.assign(points)

    forms = [form for name in (*found, "latest") for form in (name, name + ".raw")]
    assert len(forms) == len(set(forms)), f"seed {seed}"
    assert found[0] == "current"
    assert all(name and "/" not in name and name not in (".", "..") for name in found)
    assert all(len(name.encode()) <= 251 for name in found)


@pytest.mark.timeout(20)
def test_sixty_five_thousand_equal_snapshots_are_named_in_seconds() -> None:
    points = [active(), *(snapshot(b"a", b"1", ordinal=place) for place in range(65536))]

    assert len(set(names.assign(points))) == 65537
