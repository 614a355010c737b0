"""The gate: what a person names, what an image names, and who vouches for it. Own fixtures.

tests/hostile/test_gate.py tries to get past it, tests/meta/test_opening.py shows that there is no way around it.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from qcowfs import gate
from qcowfs.errors import GateRefused, SourceError
from qcowfs.gate import Gate, Policy
from qcowfs.source.remote import Remotes
from qcowfs.source.url import Url, parse_url


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An image beside which, below which and outside of whose directory there are files."""
    for name in ("images/top", "images/base", "images/below/base", "images-more/base", "base", "links/base"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "links" / "below").mkdir()
    (tmp_path / "links" / "below" / "base").write_text("links/below/base")
    return tmp_path / "images" / "top"


@pytest.fixture
def opened() -> Iterator[list[int]]:
    """Descriptors that are closed in the end."""
    descriptors: list[int] = []
    yield descriptors
    for descriptor in descriptors:
        os.close(descriptor)


def text(descriptor: int) -> str:
    try:
        return os.read(descriptor, 100).decode()
    finally:
        os.close(descriptor)


def gate_of(image: Path, policy: Policy | None = None) -> Gate:
    """A gate that has `image` open."""
    found = Gate(policy or Policy())
    os.close(found.open_image(str(image)))
    return found


def named(opener: Gate, path: Path | str) -> str:
    """Return what is in the file `path` that an image names."""
    return text(opener.open_named_file(str(path), named_by="/some/top.qcow2", role="backing file"))


class TestAPersonsWord:
    def test_is_opened_wherever_it_is(self, image: Path) -> None:
        assert text(Gate(Policy()).open_image(str(image))) == "images/top"

    @pytest.mark.parametrize("name", ["images/top", "./images/../base", "link"])
    def test_may_be_relative_or_a_link(self, image: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        (image.parents[1] / "link").symlink_to("links/base")
        monkeypatch.chdir(image.parents[1])

        assert text(Gate(Policy()).open_image(name)) == {"link": "links/base"}.get(name, os.path.normpath(name))

    def test_becomes_a_descriptor_that_waits_and_is_not_inherited(self, image: Path, opened: list[int]) -> None:
        opened.append(Gate(Policy()).open_image(str(image)))

        assert os.get_blocking(opened[0])
        assert not os.get_inheritable(opened[0])

    @pytest.mark.parametrize(
        ("name", "number", "why"),
        [
            ("gone", errno.ENOENT, "No such file or directory"),
            ("", errno.ENOENT, "No such file or directory"),
            ("images", errno.EISDIR, "a directory, not a file or a block device"),
            ("images/", errno.EISDIR, "a directory, not a file or a block device"),
            (".", errno.EISDIR, "a directory, not a file or a block device"),
            ("/", errno.EISDIR, "a directory, not a file or a block device"),
            ("images/top/", errno.ENOTDIR, "Not a directory"),
            ("images/top/x", errno.ENOTDIR, "Not a directory"),
            ("/dev/null", errno.EINVAL, "a character device, not a file or a block device"),
            ("fifo", errno.EINVAL, "a FIFO, not a file or a block device"),
            ("socket", errno.EINVAL, "a socket, not a file or a block device"),
            ("circle", errno.ELOOP, "Too many levels of symbolic links"),
            ("x" * 256, errno.ENAMETOOLONG, "File name too long"),
        ],
    )
    def test_that_is_no_image_file_is_one_clear_line(
        self, image: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int, why: str
    ) -> None:
        monkeypatch.chdir(image.parents[1])
        os.mkfifo("fifo")
        os.symlink("circle", "circle")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("socket")

            with pytest.raises(SourceError) as caught:
                Gate(Policy()).open_image(name)
        assert f"{name}: cannot open: {why}" == str(caught.value)
        assert number == caught.value.errno

    def test_without_permission_says_so(self, image: Path) -> None:
        image.chmod(0)
        if os.geteuid() == 0:
            os.seteuid(65534)
        try:
            with pytest.raises(SourceError, match="Permission denied"):
                Gate(Policy()).open_image(str(image))
        finally:
            if os.getuid() == 0:
                os.seteuid(0)


class TestAnImageMayName:
    @pytest.mark.parametrize("name", ["images/base", "images/below/base", "images/below/../base", "images/./top"])
    def test_files_in_and_below_its_directory(self, image: Path, name: str) -> None:
        assert named(gate_of(image), image.parents[1] / name) == os.path.normpath(name)

    @pytest.mark.parametrize("name", ["base", "images-more/base", "images/../base", "images/below/../../base"])
    def test_no_file_elsewhere(self, image: Path, name: str) -> None:
        """A directory whose name begins like the right one is another directory."""
        with pytest.raises(GateRefused, match="outside the directories of the image's layers"):
            named(gate_of(image), f"{image.parents[1]}/{name}")

    def test_a_link_by_where_it_leads(self, image: Path) -> None:
        (image.parent / "inside").symlink_to("below/base")
        (image.parent / "outside").symlink_to("../base")
        (image.parent / "directory").symlink_to("../links")

        assert named(gate_of(image), image.parent / "inside") == "images/below/base"
        for name in ("outside", "directory/base"):
            with pytest.raises(GateRefused):
                named(gate_of(image), image.parent / name)

    def test_files_beside_the_link_that_the_person_named(self, image: Path) -> None:
        """R41: relative names begin there. Beside it, not below: the link's place says less than the image's own."""
        link = image.parents[1] / "links" / "top"
        link.symlink_to(image)

        assert named(gate_of(link), link.with_name("base")) == "links/base"
        assert named(gate_of(link), image.with_name("base")) == "images/base"
        with pytest.raises(GateRefused):
            named(gate_of(link), link.parent / "below" / "base")

    def test_files_beside_the_root_but_not_below_it(self, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """An image in "/" does not vouch for the whole machine."""
        monkeypatch.setattr(gate, "_place_of", lambda descriptor: "/top.qcow2")
        opener = gate_of(image)

        with pytest.raises(GateRefused):
            named(opener, image)
        with pytest.raises(SourceError, match="No such file"):
            named(opener, "/there-is-no-such-file")

    def test_what_the_policy_allows(self, image: Path) -> None:
        allowed = Policy(allow=(str(image.parents[1] / "images-more"),))

        assert named(gate_of(image, allowed), image.parents[1] / "images-more" / "base") == "images-more/base"
        with pytest.raises(GateRefused):
            named(gate_of(image, allowed), image.parents[1] / "base")

    def test_a_single_file_that_the_policy_allows(self, image: Path) -> None:
        other = image.parents[1] / "links" / "base"
        allowed = Policy(allow=(str(other),))

        assert named(gate_of(image, allowed), other) == "links/base"
        with pytest.raises(GateRefused):
            named(gate_of(image, allowed), other.parent / "below" / "base")

    def test_everything_if_the_policy_says_any(self, image: Path) -> None:
        assert named(gate_of(image, Policy(allow_any=True)), image.parents[1] / "base") == "base"

    def test_files_beside_a_layer_that_was_opened(self, image: Path, opened: list[int]) -> None:
        other = image.parents[1] / "links" / "base"
        opener = gate_of(image, Policy(allow=(str(other),)))
        opened.append(opener.open_named_file(str(other), named_by="top", role="backing file"))
        (other.parent / "more").write_text("more")
        with pytest.raises(GateRefused):
            named(opener, other.parent / "more")

        opener.vouch(opened[0])

        assert named(opener, other.parent / "more") == "more"
        with pytest.raises(GateRefused):
            named(opener, other.parent / "below" / "base")


class TestALayerWhoseFormatWasGuessed:
    """Its bytes may be a guest's, which then wrote the names in it."""

    def test_vouches_for_nothing_nor_does_any_layer_before_it_or_after(self, image: Path, opened: list[int]) -> None:
        opener = gate_of(image)
        opener.distrust("/images/guessed")
        opened.append(os.open(image, os.O_RDONLY))
        opener.vouch(opened[0])

        with pytest.raises(GateRefused) as caught:
            named(opener, image.with_name("base"))
        assert (
            f"/some/top.qcow2: it names the backing file {image.with_name('base')}: "
            "the format of /images/guessed was not recorded, so a guest may have written its names"
        ) == str(caught.value)
        assert caught.value.hint == f"--allow-backing {image.parent} allows it"

    @pytest.mark.parametrize("anything", [True, False])
    def test_is_followed_where_the_person_said_so(self, image: Path, anything: bool) -> None:
        opener = gate_of(image, Policy(allow=() if anything else (str(image.parent),), allow_any=anything))
        opener.distrust("/images/guessed")

        assert named(opener, image.with_name("base")) == "images/base"

    def test_is_told_by_the_first_of_them(self, image: Path) -> None:
        opener = gate_of(image)
        opener.distrust("/images/first")
        opener.distrust("/images/second")

        with pytest.raises(GateRefused, match="/images/first"):
            named(opener, image.with_name("base"))


class TestARefusal:
    def test_says_who_names_what_and_which_option_allows_it(self, image: Path) -> None:
        other = image.parents[1] / "a b" / "base"

        with pytest.raises(GateRefused) as caught:
            named(gate_of(image), other)
        assert (
            f"/some/top.qcow2: it names the backing file {other}: it lies outside the directories of the image's layers"
        ) == str(caught.value)
        assert caught.value.hint == f"--allow-backing '{other.parent}' allows it"
        assert (caught.value.errno, caught.value.exit_code) == (errno.EACCES, 16)

    def test_does_not_tell_whether_the_file_is_there(self, image: Path) -> None:
        """A service that shows its errors would show the names of the machine's files with them."""
        there, not_there = image.parents[1] / "base", image.parents[1] / "nothing"

        said = []
        for path in (there, not_there):
            with pytest.raises(GateRefused) as caught:
                named(gate_of(image), path)
            said.append(str(caught.value).replace(path.name, "NAME"))
        assert said[0] == said[1]

    @pytest.mark.parametrize("policy", [Policy(), Policy(allow=("/",)), Policy(allow_any=True)], ids=str)
    @pytest.mark.parametrize(
        "path", ["/proc/self/environ", "//proc/kmsg", "/sys/kernel/vmcoreinfo", "/proc", "/dev/../proc/1/maps"]
    )
    def test_of_the_kernels_files_is_final(self, image: Path, policy: Policy, path: str) -> None:
        with pytest.raises(GateRefused, match="no file of the kernel's own") as caught:
            named(gate_of(image, policy), path)
        assert caught.value.hint is None


class TestAFileThatCannotBeOpened:
    @pytest.mark.parametrize(
        ("name", "why"),
        [
            ("gone", "No such file or directory"),
            ("base/", "a directory"),
            ("below", "a directory, not a file or a block device"),
            ("top/x", "Not a directory"),
            ("fifo", "a FIFO, not a file or a block device"),
            ("null", "a character device, not a file or a block device"),
            ("circle", "Too many levels of symbolic links"),
            ("circle/base", "Too many levels of symbolic links"),
            ("x" * 256, "File name too long"),
        ],
    )
    def test_is_named_with_the_layer_that_names_it(self, image: Path, name: str, why: str) -> None:
        os.mkfifo(image.with_name("fifo"))
        image.with_name("circle").symlink_to("circle")
        image.with_name("null").symlink_to("/dev/null")
        if name == "base/":
            name = "below/"
        path = f"{image.parent}/{name}"

        with pytest.raises(SourceError) as caught:
            named(gate_of(image, Policy(allow=(str(image.parent), "/dev/null"))), path)
        assert str(caught.value).startswith(f"/some/top.qcow2: cannot open backing file {path}: {why}")

    def test_and_is_missing_comes_with_a_hint(self, image: Path) -> None:
        with pytest.raises(SourceError) as caught:
            named(gate_of(image), image.with_name("gone"))
        assert caught.value.hint == (
            "bring the backing file back to that place, or correct the name with qemu-img rebase -u"
        )

    def test_is_refused_where_proc_is_not_the_kernels(self, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """In a chroot whose owner made a /proc of his own, the descriptor would be another file."""
        real_open = os.open
        other = str(image.with_name("base"))

        def lying_open(path: str, flags: int, *more: int, **named: int) -> int:
            return real_open(other if path.startswith("/proc/self/fd/") else path, flags, *more, **named)

        monkeypatch.setattr(os, "open", lying_open)

        with pytest.raises(SourceError, match="Stale"):
            Gate(Policy()).open_image(str(image))


class TestUrls:
    """What an image names on servers. No server is asked: where the gate lets a URL through, opening it is stood in."""

    TOP = parse_url("https://h/images/top.qcow2")

    @pytest.fixture(autouse=True)
    def opened_urls(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        found: list[str] = []

        def open_remote(_remotes: Remotes, url: Url, *, confined: bool = False) -> None:
            found.append(f"{url.text} (no other host)" if confined else url.text)

        monkeypatch.setattr(Remotes, "open", open_remote)
        return found

    def name(self, opener: Gate, text: str) -> None:
        opener.open_named_url(parse_url(text), named_by="top.qcow2", role="backing file")

    @pytest.mark.parametrize(
        "text",
        [
            *("https://h/images/below/x", "https://h/x", "https://other/images/x", "http://h/images/x"),
            *("https://h:444/images/x", "nbd://h/x", "iscsi://h/images/1", "s3://h/images/x"),
        ],
    )
    def test_outside_the_folder_of_the_image_are_refused(self, opened_urls: list[str], text: str) -> None:
        opener = Gate(Policy())
        opener.open_image_url(self.TOP)

        with pytest.raises(GateRefused, match="it lies outside the folders of the image's layers") as caught:
            self.name(opener, text)

        assert [self.TOP.text] == opened_urls
        assert caught.value.hint == f"--allow-backing {text} allows it"

    def test_are_refused_to_a_file(self, image: Path, opened_urls: list[str]) -> None:
        with pytest.raises(GateRefused):
            self.name(gate_of(image), "https://h/images/x")

        assert not opened_urls

    def test_beside_a_layer_are_opened(self, opened_urls: list[str]) -> None:
        opener = Gate(Policy())
        opener.open_image_url(self.TOP)
        opener.vouch_for_url(parse_url("https://h/golden/base"))
        self.name(opener, "https://h/images/x")
        self.name(opener, "https://h/golden/x")

        assert ["https://h/images/x (no other host)", "https://h/golden/x (no other host)"] == opened_urls[1:]

    def test_that_the_policy_covers_are_opened(self, image: Path, opened_urls: list[str]) -> None:
        self.name(gate_of(image, Policy(allow_urls=(parse_url("https://h/images"),))), "https://h/images/below/x")

        assert ["https://h/images/below/x"] == opened_urls

    def test_count_for_nothing_once_a_format_was_guessed(self) -> None:
        opener = Gate(Policy())
        opener.open_image_url(self.TOP)
        opener.distrust("https://h/images/base")

        with pytest.raises(GateRefused, match="a guest may have written its names"):
            self.name(opener, "https://h/images/x")

    @pytest.mark.parametrize("last", ["..%2fx", "..", "%2e%2E/x", "a%2fx", "..%2f"])
    def test_that_climb_out_of_the_folder_are_refused(self, opened_urls: list[str], last: str) -> None:
        opener = Gate(Policy())
        opener.open_image_url(self.TOP)

        with pytest.raises(GateRefused):
            self.name(opener, f"https://h/images/{last}")
        assert [self.TOP.text] == opened_urls

    def test_of_another_server_on_another_socket_are_refused(self) -> None:
        opener = Gate(Policy())
        opener.open_image_url(parse_url("nbd+unix:///top?socket=/run/a"))
        self.name(opener, "nbd+unix:///base?socket=/run/a")

        with pytest.raises(GateRefused):
            self.name(opener, "nbd+unix:///base?socket=/run/b")

    def test_have_no_options_not_even_with_any(self, opened_urls: list[str]) -> None:
        with pytest.raises(GateRefused, match="a URL in an image has no options"):
            self.name(Gate(Policy(allow_any=True)), "nbds://h/x?tls-certificates=/root")

        assert not opened_urls
