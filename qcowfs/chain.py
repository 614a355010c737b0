"""The chain of an image: its layers from the active one down to the base, opened and checked.

Used by snapshot and by everything above. Opening a chain reads headers and snapshot tables and nothing else. What a
layer names is opened by the gate alone. A Chain is immutable but for `close`; any thread.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType

from qcowfs import filename, gate, limits, qcow1, raw
from qcowfs._source import FileSource, SliceSource, Source
from qcowfs.errors import CorruptImage, NotAnImage, SourceError, UnsupportedImage, printable
from qcowfs.filename import FileName
from qcowfs.qcow2 import header as qcow2
from qcowfs.qcow2.snapshots import SnapshotEntry, read_snapshots
from qcowfs.source.lock import LocksUnsupported, hold_reader_locks, writer_present

__all__ = ["FORMATS", "Chain", "Layer", "open_chain"]

FORMATS = ("qcow2", "qcow", "raw")
RAW_ALIASES = ("file", "host_device")  # protocol drivers recorded as a format by old tools: bytes as they are


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One opened image of a chain.

    Attributes:
        depth: 0 for the image on the command line.
        path: the absolute name that it was opened by, symbolic links and all.
        format: "qcow2", "qcow" or "raw".
        source: its bytes; `data` is where standard clusters are: the same, or the external data file.
        header: None for raw.
        virtual_size, disk_size: bytes of its active disk; bytes that its files take on the host.
        modified_ns: when the file was last written, nanoseconds since the epoch.
        backing_name, backing_format: as stored; None where there is none.
        written_by_other: another process has it open for writing.
        file_id: tells whether two layers are the same file.
    """

    depth: int
    path: str
    format: str
    source: Source
    data: Source
    data_path: str | None
    header: qcow2.Header | qcow1.Header | None
    snapshots: tuple[SnapshotEntry, ...]
    virtual_size: int
    disk_size: int
    modified_ns: int
    backing_name: bytes | None
    backing_format: bytes | None
    written_by_other: bool
    file_id: tuple[int, int]


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
            _close(layer)

    def __enter__(self) -> Chain:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_chain(image: str, policy: gate.Policy, *, lock: bool = True, image_format: str | None = None) -> Chain:
    """Open `image` and all that it is based on.

    Args:
        image: a path, the person's own word.
        policy: which files that images name may be opened.
        lock: hold the lock bytes of a QEMU reader, so that nobody changes the image meanwhile.
        image_format: the format of `image`; None: find out.

    Raises:
        ImageError: some layer cannot be opened, read or allowed; nothing stays open.
    """
    opener = _Opener(policy, lock=lock)
    try:
        opener.open_all(os.path.join(os.getcwd(), image), image_format)  # not abspath: a link may come before ".."
    except BaseException:
        opener.close()
        raise
    return Chain(image, tuple(opener.layers), tuple(opener.warnings))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Opened:
    """A file that was opened and is not a layer yet."""

    path: str
    source: Source
    status: os.stat_result
    descriptor: int
    probed: bool  # a backing file whose format was found by looking into it: a guest may have written what it says


class _Opener:
    """Opens layer after layer; what it holds is closed by `close` if anything fails."""

    def __init__(self, policy: gate.Policy, *, lock: bool) -> None:
        self._policy = policy
        self._lock = lock
        self._loose: list[Source] = []  # opened, and not part of a layer yet
        self._near: list[str] = []  # resolved directories of the layers whose names the gate may follow
        self._seen: set[tuple[int, int]] = set()  # files that were opened as qcow2 or qcow
        self.layers: list[Layer] = []
        self.warnings: list[str] = []

    def close(self) -> None:
        for source in self._loose:
            source.close()
        for layer in self.layers:
            _close(layer)

    def open_all(self, path: str, image_format: str | None) -> None:
        opened = self._opened(gate.open_user_file(path), path, FileName(path=path), probed=False)
        self._add_layer(opened, image_format or self._probe_image(opened))
        while self.layers[-1].backing_name is not None:
            if len(self.layers) == limits.MAX_CHAIN_DEPTH:
                raise UnsupportedImage(
                    path, "its chain is too deep", f"at most {limits.MAX_CHAIN_DEPTH} layers are opened"
                )
            self._add_backing(self.layers[-1], self.layers[-1].backing_name)

    def _add_backing(self, overlay: Layer, name: bytes) -> None:
        said = filename.parse(name, overlay.path)
        recorded = _recorded_format(overlay) or said.format
        opened = self._open_named(overlay.path, said, "backing file", probed=recorded is None)
        if recorded is None:
            recorded = self._probe_backing(overlay, opened)
        if (said.offset or said.size is not None) and recorded != "raw":
            raise UnsupportedImage(
                overlay.path, "its json: name is not supported", "offset and size need the driver raw"
            )
        self._add_layer(opened, recorded)

    def _add_layer(self, opened: _Opened, image_format: str) -> None:
        layer = self._layer(opened, image_format)
        if layer.header is not None:
            if layer.file_id in self._seen:
                raise CorruptImage(layer.path, "its backing chain never ends", "it is based on itself")
            self._seen.add(layer.file_id)
        self.layers.append(layer)
        self._loose.clear()
        self._warn_about(layer)

    def _layer(self, opened: _Opened, image_format: str) -> Layer:
        self._trust(opened)
        written = self._written_by_other(opened)  # first: what is read under the lock cannot change any more
        header = _read_header(opened.source, image_format)
        snapshots = read_snapshots(opened.source, header) if isinstance(header, qcow2.Header) else ()
        data = self._data_file(opened, header)
        if data is not None:
            written = self._written_by_other(data) or written
        blocks = opened.status.st_blocks + (data.status.st_blocks if data else 0)
        return Layer(
            depth=len(self.layers),
            path=opened.path,
            format=image_format,
            source=opened.source,
            data=data.source if data else opened.source,
            data_path=data.path if data else None,
            header=header,
            snapshots=snapshots,
            virtual_size=header.virtual_size if header else raw.virtual_size(opened.source),
            disk_size=blocks * 512,
            modified_ns=opened.status.st_mtime_ns,
            backing_name=header.backing_name if header else None,
            backing_format=header.backing_format if isinstance(header, qcow2.Header) else None,
            written_by_other=written,
            file_id=_file_id(opened.status),
        )

    def _open_named(self, by: str, said: FileName, role: str, *, probed: bool) -> _Opened:
        tried = list(_candidates(by, said, role))
        path = next((candidate for candidate in tried if os.path.lexists(candidate)), tried[0])
        descriptor = gate.open_named_file(path, policy=self._policy, near=self._near, named_by=by, role=role)
        return self._opened(descriptor, path, said, probed=probed)

    def _opened(self, descriptor: int, path: str, said: FileName, *, probed: bool) -> _Opened:
        source: Source = FileSource(descriptor, path)
        self._loose.append(source)
        if said.offset or said.size is not None:
            try:
                source = SliceSource(source, said.offset, said.size)
            except ValueError as error:
                raise SourceError(path, "its json: name asks for a window", "which lies past the file's end") from error
        return _Opened(path=path, source=source, status=os.fstat(descriptor), descriptor=descriptor, probed=probed)

    def _trust(self, opened: _Opened) -> None:
        """From now on follow names to the directory of `opened`, or, if it may lie, to no directory but the allowed."""
        if opened.probed:
            self._near.clear()
        else:
            self._near.append(os.path.dirname(os.path.realpath(opened.path)))

    def _data_file(self, opened: _Opened, header: qcow2.Header | qcow1.Header | None) -> _Opened | None:
        if not isinstance(header, qcow2.Header) or not header.external_data:
            return None
        if header.snapshots_count:
            raise UnsupportedImage(
                opened.path, "internal snapshots with an external data file", "QEMU has no such images"
            )
        if header.data_file_raw and header.backing_name is not None:
            raise CorruptImage(opened.path, "a raw external data file", "with a backing file, which excludes it")
        if header.data_file_name is None:
            raise CorruptImage(opened.path, "its external data file has no name", "a header extension was expected")
        said = filename.parse(header.data_file_name, opened.path)
        return self._open_named(opened.path, said, "data file", probed=False)

    def _probe_image(self, opened: _Opened) -> str:
        data = _start(opened)
        found = _magic_format(data)
        if found is not None:
            return found
        foreign = raw.foreign_format(data)
        if foreign is not None:
            raise UnsupportedImage(opened.path, f"a {foreign} image", "qcow2, qcow and raw are supported")
        why = "it is empty" if not data else "it starts like no known format"
        raise NotAnImage(opened.path, "not a qcow2 image", why, hint="--image-format raw takes it for a raw disk")

    def _probe_backing(self, overlay: Layer, opened: _Opened) -> str:
        """Find a format that the overlay does not record; see docs/decisions/0002-gate-and-probing.md."""
        data = _start(opened)
        foreign = raw.foreign_format(data)
        if foreign is not None:
            raise UnsupportedImage(opened.path, f"a {foreign} image", "qcow2, qcow and raw are supported")
        found = _magic_format(data) or "raw"
        if isinstance(overlay.header, qcow2.Header):  # qcow version 1 has no place to record it
            path = printable(opened.path)
            self.warnings.append(
                f"{printable(overlay.path)}: records no format of its backing file: {path} looks {found}"
            )
        return found

    def _written_by_other(self, opened: _Opened) -> bool:
        try:
            if self._lock:
                return not hold_reader_locks(opened.descriptor)
            return writer_present(opened.descriptor)
        except LocksUnsupported:
            path = printable(opened.path)
            self.warnings.append(f"{path}: its file system has no locks: nobody can tell whether it is being written")
        except OSError as error:
            raise SourceError.from_oserror(opened.path, "cannot lock", error) from error
        return False

    def _warn_about(self, layer: Layer) -> None:
        path = printable(layer.path)
        if not isinstance(layer.header, qcow2.Header):
            return
        if layer.header.corrupt:
            self.warnings.append(f"{path}: marked corrupt by QEMU: what can be read is shown")
        if layer.header.dirty and not layer.written_by_other:
            self.warnings.append(f"{path}: was not closed cleanly: its refcounts may be stale, its data is right")


def _candidates(by: str, said: FileName, role: str) -> Iterator[str]:
    """Where `said` may be, in the order of trying: QEMU's place first, then the kinder ones.

    QEMU joins a relative backing name to the name the overlay was opened by, symbolic links unresolved, and looks for
    relative data files, file: and json: names in the working directory. A working directory has nothing to do with an
    image, so here the image's directory goes first for those.
    """
    if said.path.startswith("/"):
        yield said.path
        return
    yield os.path.join(os.path.dirname(by), said.path)
    yield os.path.join(os.path.dirname(os.path.realpath(by)), said.path)
    if role == "data file" or not said.relative_to_image:
        yield os.path.abspath(said.path)


def _recorded_format(overlay: Layer) -> str | None:
    if overlay.backing_format is None:
        return None
    recorded = os.fsdecode(overlay.backing_format)
    if recorded in RAW_ALIASES:
        return "raw"
    if recorded not in FORMATS:
        raise UnsupportedImage(
            overlay.path, f"its backing file has the format {printable(recorded)}", "qcow2, qcow and raw are supported"
        )
    return recorded


def _read_header(source: Source, image_format: str) -> qcow2.Header | qcow1.Header | None:
    if image_format == "qcow2":
        return qcow2.read_header(source)
    return qcow1.read_header(source) if image_format == "qcow" else None


def _start(opened: _Opened) -> bytes:
    try:
        return opened.source.read_at(0, raw.PROBE_LENGTH)
    except OSError as error:
        raise SourceError.from_oserror(opened.path, "cannot read", error) from error


def _magic_format(data: bytes) -> str | None:
    if not data.startswith(qcow2.MAGIC):
        return None
    return "qcow" if data.startswith(qcow1.MAGIC) else "qcow2"


def _file_id(status: os.stat_result) -> tuple[int, int]:
    if stat.S_ISBLK(status.st_mode):  # two device nodes can be the same device
        return -1, status.st_rdev
    return status.st_dev, status.st_ino


def _close(layer: Layer) -> None:
    for source in (layer.source, layer.data):
        with suppress(OSError):
            source.close()
