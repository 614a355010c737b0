"""The layers of a chain, as `qemu-img info --backing-chain` lists them: names, formats, sizes. R41 to R49."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from qcowfs.chain import Layer, open_chain
from qcowfs.gate import Policy
from tests.support import need
from tests.support.qemu import qemu

MIB = 1 << 20


@pytest.fixture(autouse=True)
def _tools() -> None:
    need("qemu-img")


def create(path: Path, size: str, *words: str, image_format: str = "qcow2") -> Path:
    qemu("qemu-img", "create", "-q", "-f", image_format, *words, path, size)
    return path


def based(path: Path, name: str, backing_format: str, *words: str) -> Path:
    """Create an overlay of 4 MiB whose backing file has the name `name`, without looking for it."""
    return create(path, "4M", "-u", "-b", name, "-F", backing_format, *words)


def facts_of_qemu(layer: dict[str, Any]) -> dict[str, Any]:
    keys = ("format", "virtual-size", "backing-filename", "backing-filename-format", "actual-size", "cluster-size")
    found = {key: layer.get(key) for key in keys}
    found["file"] = os.stat(layer["filename"]).st_ino
    found["snapshots"] = [(entry["id"], entry["name"]) for entry in layer.get("snapshots", [])]
    return found


def facts_of_qcowfs(layer: Layer) -> dict[str, Any]:
    def text(name: bytes | None) -> str | None:
        return None if name is None else os.fsdecode(name)

    # QEMU has no cluster size of raw files, and none of the backing formats of version 1.
    return {
        "format": layer.format,
        "virtual-size": layer.virtual_size,
        "backing-filename": text(layer.backing_name),
        "backing-filename-format": text(layer.backing_format),
        "actual-size": layer.disk_size,
        "cluster-size": layer.header.cluster_size if layer.header else None,
        "file": os.stat(layer.path).st_ino,
        "snapshots": [(text(entry.id), text(entry.name)) for entry in layer.snapshots],
    }


def compare(image: Path | str, *, policy: Policy | None = None) -> tuple[str, ...]:
    """Every layer is what QEMU says of it; returns the base names of the layers."""
    said = qemu("qemu-img", "info", "--backing-chain", "--output=json", "-f", "qcow2", image)
    with open_chain(str(image), policy or Policy()) as chain:
        assert [facts_of_qemu(layer) for layer in json.loads(said.stdout)] == [
            facts_of_qcowfs(layer) for layer in chain.layers
        ]
        assert list(range(len(chain.layers))) == [layer.depth for layer in chain.layers]
        return tuple(os.path.basename(layer.path) for layer in chain.layers)


def test_r41_a_chain_of_all_formats(tmp_path: Path) -> None:
    create(tmp_path / "base.raw", "4M", image_format="raw")
    middle = based(tmp_path / "middle.qcow2", "base.raw", "raw", "-o", "compat=0.10,cluster_size=4k")
    qemu("qemu-img", "snapshot", "-c", "one", middle)
    qemu("qemu-img", "snapshot", "-c", "two", middle)
    image = based(tmp_path / "top.qcow2", "middle.qcow2", "qcow2", "-o", "extended_l2=on")

    assert ("top.qcow2", "middle.qcow2", "base.raw") == compare(image)


@pytest.mark.parametrize(
    "name", ["./a:b.qcow2", "sub/base.qcow2", "../images/base.qcow2", "{}/base.qcow2", "x y,z.qcow2"]
)
def test_r41_r42_names_lead_where_qemu_finds_them(tmp_path: Path, name: str) -> None:
    images = tmp_path / "images"
    (images / "sub").mkdir(parents=True)
    full = name.format(images)
    create(images / full, "4M")

    assert len(compare(based(images / "top.qcow2", full, "qcow2"))) == 2


@pytest.mark.parametrize("called", ["top.qcow2", "./top.qcow2", "../images/top.qcow2", "link/../images/top.qcow2"])
def test_r41_a_relative_name_belongs_to_the_name_of_its_overlay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, called: str
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    (images / "link").symlink_to(images)
    create(images / "base.qcow2", "4M")
    based(images / "top.qcow2", "base.qcow2", "qcow2")
    monkeypatch.chdir(images)

    compare(called)


def test_r41_a_linked_image_finds_what_lies_beside_the_link(tmp_path: Path) -> None:
    """Two files have the name; QEMU takes the one beside the link."""
    for place in ("real", "links"):
        (tmp_path / place).mkdir()
        create(tmp_path / place / "base.qcow2", "4M" if place == "links" else "3M")
    based(tmp_path / "real" / "top.qcow2", "base.qcow2", "qcow2")
    link = tmp_path / "links" / "top.qcow2"
    link.symlink_to(tmp_path / "real" / "top.qcow2")

    compare(link)


def test_r41_a_linked_image_finds_what_lies_beside_the_file_where_qemu_fails(tmp_path: Path) -> None:
    """Kinder than QEMU, on purpose."""
    (tmp_path / "real").mkdir()
    create(tmp_path / "real" / "base.qcow2", "4M")
    based(tmp_path / "real" / "top.qcow2", "base.qcow2", "qcow2")
    link = tmp_path / "link.qcow2"
    link.symlink_to("real/top.qcow2")

    assert qemu("qemu-img", "info", "--backing-chain", link, check=False).returncode != 0
    with open_chain(str(link), Policy()) as chain:
        assert ["link.qcow2", "base.qcow2"] == [os.path.basename(layer.path) for layer in chain.layers]


@pytest.mark.parametrize("protocol", ["file:", 'json:{"driver":"qcow2","file.filename":"%s"}'])
def test_r42_r44_absolute_names_in_other_words(tmp_path: Path, protocol: str) -> None:
    base = create(tmp_path / "base.qcow2", "4M")
    name = protocol % base if "%s" in protocol else protocol + str(base)
    image = based(tmp_path / "top.qcow2", name, "qcow2")

    with open_chain(str(image), Policy()) as chain:
        assert ["top.qcow2", "base.qcow2"] == [os.path.basename(layer.path) for layer in chain.layers]
    assert qemu("qemu-img", "info", "--backing-chain", image).returncode == 0


@pytest.mark.parametrize("size", [1_000_003, 1, 512, 4 * MIB, 5 * MIB + 1])
def test_r5_r46_r47_a_raw_base_of_any_length(tmp_path: Path, size: int) -> None:
    (tmp_path / "base.raw").write_bytes(b"\x01" * size)

    compare(based(tmp_path / "top.qcow2", "base.raw", "raw"))


def test_r45_the_recorded_format_wins(tmp_path: Path) -> None:
    create(tmp_path / "base.qcow2", "64M")

    compare(based(tmp_path / "top.qcow2", "base.qcow2", "raw"))


def test_r15_version_1_in_the_middle(tmp_path: Path) -> None:
    create(tmp_path / "base.raw", "4M", image_format="raw")
    create(tmp_path / "middle.qcow", "4M", "-b", str(tmp_path / "base.raw"), "-F", "raw", image_format="qcow")
    image = based(tmp_path / "top.qcow2", "middle.qcow", "qcow")
    policy = Policy(allow=(os.path.realpath(tmp_path),))  # version 1 records no format, so its names are not trusted

    assert ("top.qcow2", "middle.qcow", "base.raw") == compare(image, policy=policy)


@pytest.mark.parametrize("link", [os.symlink, os.link, shutil.copy], ids=["symbolic link", "hard link", "copy"])
def test_r49_loops_are_found_through_links_of_both_kinds(tmp_path: Path, link: Any) -> None:
    """The copy is named by the first and by itself."""
    first = based(tmp_path / "first.qcow2", "second.qcow2", "qcow2")
    link(first, tmp_path / "second.qcow2")

    with pytest.raises(Exception, match="its backing chain never ends"):
        open_chain(str(first), Policy())
    assert qemu("qemu-img", "info", "--backing-chain", first, check=False).returncode != 0


def test_a_real_chain_of_30_layers(tmp_path: Path) -> None:
    create(tmp_path / "0.qcow2", "4M")
    for number in range(1, 30):
        image = based(tmp_path / f"{number}.qcow2", f"{number - 1}.qcow2", "qcow2")

    assert len(compare(image)) == 30


def test_the_names_are_those_that_qemu_resolves(tmp_path: Path) -> None:
    create(tmp_path / "base.qcow2", "4M")
    image = based(tmp_path / "top.qcow2", "base.qcow2", "qcow2")
    said = json.loads(qemu("qemu-img", "info", "--output=json", image).stdout)

    with open_chain(str(image), Policy()) as chain:
        assert [said["filename"], said["full-backing-filename"]] == [layer.path for layer in chain.layers]
