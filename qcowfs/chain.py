"""The chain of an image: its layers from the active one down to the base, opened and checked.

Used by snapshot and by everything above. Opening a chain reads headers and snapshot tables and nothing else. What a
layer names is opened by the gate alone. A Chain is immutable but for `close`; any thread.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Hashable, Iterator
from contextlib import suppress
from types import TracebackType

from qcowfs import filename, limits, qcow1, raw
from qcowfs._source import Source, descriptor_of
from qcowfs.backingname import SUPPORTED, BackingName, backing_name
from qcowfs.errors import CorruptImage, NotAnImage, SourceError, UnsupportedImage, UsageError, printable
from qcowfs.filename import FORMATS, FileName
from qcowfs.gate import Gate, Policy
from qcowfs.layer import Layer
from qcowfs.qcow2 import header as qcow2
from qcowfs.qcow2.snapshots import SnapshotEntry, read_snapshots
from qcowfs.source import foreign
from qcowfs.source.file import File, open_file, remote_file
from qcowfs.source.lock import LocksUnsupported, hold_reader_locks, writer_present
from qcowfs.source.remote import Remotes
from qcowfs.source.url import Url, is_url, parse_url

__all__ = ["FORMATS", "Chain", "Layer", "open_chain", "read_tables", "shown_name"]

Header = qcow2.Header | qcow1.Header
Snapshots = tuple[SnapshotEntry, ...]

ATTEMPTS = 4  # to read tables that move; a machine that makes snapshots without a break is not to be caught
PROBED = ("qcow2", "qcow", "raw")  # what a backing file may be whose format nobody recorded; a guest may have chosen it


class Chain:
    """Opened layers; closes them when it is closed.

    Attributes:
        image: the image as the person wrote it.
        layers: from the active one (0) to the base.
        warnings: what a person should know, one line each.
    """

    def __init__(self, image: str, layers: tuple[Layer, ...], warnings: tuple[str, ...]) -> None:
        self.image = image
        self.layers = layers
        self.warnings = warnings

    def close(self) -> None:
        """Close all files, and let go of their locks. Disks of the chain must not be read afterwards."""
        for layer in self.layers:
            layer.close()

    @property
    def remote(self) -> bool:
        """Whether reads may wait for a server, or for another process."""
        return any(descriptor_of(source) is None for layer in self.layers for source in (layer.source, layer.data))

    def break_off(self) -> None:
        """Make reads fail that wait for a server, and those that come: unlike `close` while there may be some."""
        for layer in self.layers:
            for source in (layer.source, layer.data):
                if descriptor_of(source) is None:
                    with suppress(OSError):
                        source.close()

    def __enter__(self) -> Chain:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_chain(
    image: str,
    policy: Policy,
    *,
    lock: bool = True,
    image_format: str | None = None,
    remotes: Remotes | None = None,
    written: bool = False,
) -> Chain:
    """Open `image` and all that it is based on.

    Args:
        image: a path or a URL, the person's own word.
        policy: which files that images name may be opened.
        lock: hold the lock bytes of a QEMU reader, so that nobody changes the image meanwhile.
        image_format: the format of `image`; None: find out.
        remotes: opens what is on servers; None: there is one for this chain alone.
        written: somebody writes `image`, who was asked: locks do not tell of who takes none, or of a server's.

    Raises:
        UsageError: `image` is a URL that makes no sense.
        ImageError: some layer cannot be opened, read or allowed; nothing stays open.
    """
    opener = _Opener(policy, remotes or Remotes(), lock=lock, written=written)
    try:
        opener.open_all(image, image_format)
    except BaseException:
        opener.close()
        raise
    return Chain(shown_name(image), tuple(opener.layers), tuple(opener.warnings))


def shown_name(image: str) -> str:
    """Return how a person's word for an image may be shown: a URL without its secrets, a path as it is."""
    return _person_url(image).shown if is_url(image) else image


def _person_url(text: str) -> Url:
    try:
        return parse_url(text)
    except ValueError as error:
        raise UsageError(f"{printable(text.partition('://')[0])}://...: {error}") from error


class _Opener:
    """Opens layer after layer; what it holds is closed by `close` if anything fails."""

    def __init__(self, policy: Policy, remotes: Remotes, *, lock: bool, written: bool) -> None:
        self._gate = Gate(policy, remotes)
        self._remotes = remotes
        self._lock = lock
        self._written = written
        self._loose: list[File] = []  # opened, and not part of a layer yet
        self._seen: dict[Hashable, Layer] = {}  # files that were opened as qcow2 or qcow
        self.layers: list[Layer] = []
        self.warnings: list[str] = []

    def close(self) -> None:
        for file in self._loose:
            file.close()
        for layer in self.layers:
            layer.close()

    def open_all(self, image: str, image_format: str | None) -> None:
        file = self._open_image(image)
        self._add_layer(file, image_format or self._probe_image(file))
        named = backing_name(self.layers[0], None)
        while named is not None:
            if len(self.layers) == limits.MAX_CHAIN_DEPTH:
                why = f"at most {limits.MAX_CHAIN_DEPTH} layers are opened"
                raise UnsupportedImage(self.layers[0].path, "its chain is too deep", why)
            self._add_backing(named)
            named = backing_name(self.layers[-1], named)

    def _open_image(self, image: str) -> File:
        if is_url(image):
            url = _person_url(image)
            return self._held(remote_file(self._gate.open_image_url(url), url))
        return self._held(open_file(self._gate.open_image(image), next(_absolute(image), image)))

    def _add_backing(self, named: BackingName) -> None:
        overlay, said, image_format = named.overlay, named.said, named.format()
        if (said.offset or said.size is not None) and image_format != "raw":
            why = "offset and size need the format raw"
            raise UnsupportedImage(named.by.path, "its json: name is not supported", why)
        file = self._open_named(named.by, said, "backing file")
        if image_format is None:
            self._gate.distrust(file.path)
            image_format = self._probe_backing(overlay, file)
        elif file.url:
            self._gate.vouch_for_url(file.url)
        elif file.descriptor is not None:
            self._gate.vouch(file.descriptor)
        self._require_progress(overlay, file, image_format)
        self._add_layer(file, image_format, alone=said.alone)

    def _require_progress(self, overlay: Layer, file: File, image_format: str) -> None:
        """A raw layer is the last one, so it may be any file: the bytes of an overlay above it, say."""
        first = self._seen.get(file.identity)
        if first is not None and image_format != "raw":
            why = f"{printable(overlay.path)}, layer {overlay.depth}, is based on it, and it is layer {first.depth}"
            raise CorruptImage(first.path, "its backing chain never ends", why)

    def _add_layer(self, file: File, image_format: str, *, alone: bool = False) -> None:
        layer = self._layer(file, image_format, alone=alone)
        self.layers.append(layer)
        self._loose.clear()
        if layer.header is not None:
            self._seen[layer.file_id] = layer
        self._warn_about(layer)

    def _layer(self, file: File, image_format: str, *, alone: bool) -> Layer:
        written, held = self._written_and_held(file)  # first: what is read under the lock cannot change any more
        file = file if written or held else file.settled()
        header, snapshots = read_tables(file.source, image_format, moving=not held)
        data = self._data_file(file, header)
        if data is not None:
            data_written, data_held = self._written_and_held(data)
            data = data if data_written or data_held else data.settled()
            written, held = written or data_written, held and data_held
        source = self._served(file, image_format) if image_format in foreign.FORMATS else file.source
        return Layer(
            depth=len(self.layers),
            path=file.path,
            url=file.url,
            format=image_format,
            source=source,
            data=data.source if data else source,
            data_path=data.path if data else None,
            header=header,
            snapshots=snapshots,
            virtual_size=header.virtual_size if header else raw.virtual_size(source),
            disk_size=file.disk_size + (data.disk_size if data else 0),
            modified_ns=file.modified_ns,
            backing_name=header.backing_name if header and not alone else None,
            backing_format=header.backing_format if isinstance(header, qcow2.Header) else None,
            written_by_other=written,
            told=self._is_told,
            held=held,
            data_modified_ns=data.modified_ns if data else 0,
            file_id=file.identity,
        )

    def _served(self, file: File, image_format: str) -> Source:
        """Return the disk in an image that QEMU reads for us; the layer's own disk from now on, and its last."""
        if file.descriptor is None:
            why = "only files and block devices of this machine are given to QEMU"
            raise UnsupportedImage(file.path, f"a {image_format} image on a server", why)
        disk = foreign.open_foreign(file.source, file.descriptor, image_format, self._remotes.settings)
        return self._remotes.cached(disk)  # it reads ahead, which pays in front of a process as well

    def _open_named(self, by: File | Layer, said: FileName, role: str) -> File:
        url = said.url or (by.url and not said.path.startswith("/") and by.url.beside(said.path))
        if url:
            remote = self._gate.open_named_url(url, named_by=by.path, role=role)
            return self._held(remote_file(remote, url, offset=said.offset, size=said.size))
        return self._open_named_file(by.path, said, role)

    def _open_named_file(self, by: str, said: FileName, role: str) -> File:
        tried = _candidates(by, said)
        path = next((candidate for candidate in tried if os.path.lexists(candidate)), tried[0])
        self._warn_if_qemu_differs(by, said, path)
        descriptor = self._gate.open_named_file(path, named_by=by, role=role)
        return self._held(open_file(descriptor, path, offset=said.offset, size=said.size))

    def _warn_if_qemu_differs(self, by: str, said: FileName, path: str) -> None:
        """A file of that name in the working directory is what QEMU, started here, would take."""
        here = None if said.relative_to_image else next(_absolute(said.path), None)
        if here not in (None, path) and os.path.lexists(here) and not _same_file(here, path):
            names = f"{printable(said.path)}: {printable(path)} is taken, QEMU would take {printable(here)}"
            self.warnings.append(f"{printable(by)}: names {names} when it is started here")

    def _held(self, file: File) -> File:
        self._loose.append(file)
        return file

    def _data_file(self, file: File, header: Header | None) -> File | None:
        if not isinstance(header, qcow2.Header) or not header.external_data:
            return None
        if header.snapshots_count:
            what = "internal snapshots with an external data file"
            raise UnsupportedImage(file.path, what, "QEMU has no such images")
        if header.data_file_raw and header.backing_name is not None:
            raise CorruptImage(file.path, "a raw external data file", "with a backing file, which excludes it")
        if header.data_file_name is None:
            raise CorruptImage(file.path, "its external data file has no name", "a header extension was expected")
        return self._open_named(file, filename.parse_data_file_name(header.data_file_name, file.path), "data file")

    def _probe_image(self, file: File) -> str:
        data = file.start(raw.PROBE_LENGTH)
        found = _own_format(data) or raw.foreign_format(data) or raw.foreign_footer(file.source)
        if found in FORMATS:
            return found
        if found is not None:
            raise UnsupportedImage(file.path, f"a {found} image", SUPPORTED)
        why = "it starts like no known format" if data else "it is empty"
        raise NotAnImage(file.path, "not a qcow2 image", why, hint="--image-format raw takes it for a raw disk")

    def _probe_backing(self, overlay: Layer, file: File) -> str:
        """Find a format that the overlay does not record; see docs/decisions/0002-gate-and-probing.md."""
        data = file.start(raw.PROBE_LENGTH)
        found = _own_format(data) or raw.foreign_format(data) or "raw"
        if found not in PROBED:
            why = f"{printable(overlay.path)} does not record that it is one"
            raise UnsupportedImage(file.path, f"a {found} image", why)
        if isinstance(overlay.header, qcow2.Header):  # qcow version 1 has no place to record it
            path = printable(file.path)
            self.warnings.append(
                f"{printable(overlay.path)}: records no format of its backing file: {path} looks {found}"
            )
        return found

    def _written_and_held(self, file: File) -> tuple[bool, bool]:
        """Tell whether another process writes `file`, and whether none can, or what replaces it would be noticed."""
        path = printable(file.path)
        if self._is_told:
            return True, False
        if file.descriptor is None:
            if not file.versioned:
                self.warnings.append(f"{path}: its server has no locks: nobody can tell whether it is being written")
            return False, file.versioned
        try:
            if self._lock and not self._may_be_committed_into(file.descriptor):
                held = hold_reader_locks(file.descriptor)
                return not held, held
            return writer_present(file.descriptor), False
        except LocksUnsupported:
            self.warnings.append(f"{path}: its file system has no locks: nobody can tell whether it is being written")
        except OSError as error:
            raise SourceError.from_oserror(file.path, "cannot lock", error) from error
        return False, False

    @property
    def _is_told(self) -> bool:
        return self._written and not self.layers

    def _may_be_committed_into(self, descriptor: int) -> bool:
        """A machine that writes the image may commit into the files below it: a lock there would make that fail.

        Whoever reads a file notices that it is written, but not always that a device was.
        """
        running = bool(self.layers) and self.layers[0].written_by_other
        return running and not stat.S_ISBLK(os.fstat(descriptor).st_mode)

    def _warn_about(self, layer: Layer) -> None:
        path = printable(layer.path)
        if not isinstance(layer.header, qcow2.Header):
            return
        if layer.header.corrupt:
            self.warnings.append(f"{path}: marked corrupt by QEMU: what can be read is shown")
        if layer.header.dirty and not layer.written_by_other:
            self.warnings.append(f"{path}: was not closed cleanly: its refcounts may be stale, its data is right")


def _absolute(path: str) -> Iterator[str]:
    """Yield an absolute path and change nothing else: before a ".." may come a symbolic link.

    Nothing is yielded where the working directory was deleted, so that no relative name leads anywhere.
    """
    with suppress(FileNotFoundError):
        yield path if path.startswith("/") else os.path.join(os.getcwd(), path)


def _candidates(by: str, said: FileName) -> list[str]:
    """Return where `said` may be, in the order of trying: QEMU's place first, then the kinder ones.

    QEMU joins a relative backing name to the name that the overlay was opened by, symbolic links unresolved, and looks
    for relative data files, file: and json: names in the working directory. A working directory has nothing to do with
    an image, so here the image's directory goes first for those.
    """
    if said.path.startswith("/"):
        return [said.path]
    found = [os.path.join(os.path.dirname(place), said.path) for place in (by, os.path.realpath(by))]
    return found if said.relative_to_image else [*found, *_absolute(said.path)]


def _same_file(first: str, second: str) -> bool:
    try:
        return os.path.samefile(first, second)
    except OSError:
        return False


def read_tables(source: Source, image_format: str, *, moving: bool) -> tuple[Header | None, Snapshots]:
    """Return the header and the snapshots; `moving`: another process may be writing just these.

    QEMU writes a new snapshot table, then the header that says where it is, and only then frees the old one. So a table
    is whole if the header is the same before and after it was read.

    Raises:
        ImageError: they are wrong, cannot be read, or change all the time.
    """
    if image_format != "qcow2":
        return (qcow1.read_header(source) if image_format == "qcow" else None), ()
    for _ in range(ATTEMPTS if moving else 0):
        before = qcow2.read_header(source)
        with suppress(CorruptImage):
            snapshots = read_snapshots(source, before)
            if before == qcow2.read_header(source):
                return before, snapshots
    header = qcow2.read_header(source)
    snapshots = read_snapshots(source, header)
    if moving:
        raise SourceError(source.name, "cannot read its snapshot table", "it changes all the time", hint="try again")
    return header, snapshots


def _own_format(data: bytes) -> str | None:
    """Return the format of ours that `data`, the start of a file, says it is; None if it says nothing."""
    if not data.startswith(qcow2.MAGIC):
        return None
    return "qcow" if data.startswith(qcow1.MAGIC) else "qcow2"
