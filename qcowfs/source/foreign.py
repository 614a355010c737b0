"""What QEMU reads and qcowfs does not: other formats (vmdk, vdi, ...), and other protocols (rbd, ssh, nfs, gluster).

Used by chain for the formats, by remote for the protocols. qemu-nbd serves the bytes, read-only, as a child that ends
with the source; docs/decisions/0014-foreign.md says what it may open. What it serves is read by libnbd.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from qcowfs.errors import SourceError, UnsupportedImage
from qcowfs.source.foreignformat import FORMATS, require_alone
from qcowfs.source.launch import IMAGE_NUMBER
from qcowfs.source.news import log_news
from qcowfs.source.remote import Remote, RemoteSettings, lacking_library
from qcowfs.source.url import Url

if TYPE_CHECKING:
    from qcowfs._source import Source
    from qcowfs.source.childsource import ChildSource

__all__ = ["FORMATS", "open_foreign", "open_url"]

PROGRAM = "qemu-nbd"
CLIENTS = "4"  # at a time: a connection that we gave up may not be gone yet
RBD_WORDS = {"conf": "conf", "id": "user"}


def open_foreign(base: Source, descriptor: int, image_format: str, settings: RemoteSettings) -> Source:
    """Return the disk in an image as a source, which closes `base` when it is closed.

    Args:
        base: the image's file; stays the caller's own if this fails.
        descriptor: of that file. QEMU is given it, and opens nothing else.
        image_format: one of FORMATS.

    Raises:
        UnsupportedImage: qemu-nbd or libnbd is not installed, or QEMU would need other files.
        SourceError: QEMU does not take it.
        CorruptImage: it is not an image of that format.
    """
    try:
        require_alone(base, image_format)
    except OSError as error:
        raise SourceError.from_oserror(base.name, "cannot read", error) from error
    device = stat.S_ISBLK(os.fstat(descriptor).st_mode)
    file = {"driver": "host_device" if device else "file", "filename": f"/proc/self/fd/{IMAGE_NUMBER}"}
    image = [_json({"driver": image_format, "backing": None, "file": file})]
    return _connected(
        base.name, f"a {image_format} image", image, settings, ("foreign", base.place()), base, descriptor
    )


def open_url(url: Url, settings: RemoteSettings) -> Remote:
    """Open the image that `url` names, by QEMU's own driver of its protocol.

    Raises:
        UnsupportedImage: qemu-nbd, its driver or libnbd is not installed.
        SourceError: QEMU does not take it.
    """
    # QEMU takes URLs of these protocols apart where they are names, but not where they are options.
    image = [_json({"driver": "raw", "file": _rbd(url)})] if url.scheme == "rbd" else ["--format=raw", "--", url.text]
    where = (url.scheme, url.server, unquote(url.path), url.query)
    return Remote(source=_connected(url.shown, f"the protocol {url.scheme}", image, settings, where, None, None))


def _json(node: dict[str, Any]) -> str:
    return f"json:{json.dumps({**node, 'read-only': True})}"


def _rbd(url: Url) -> dict[str, str]:
    """Return what rbd://POOL[/NAMESPACE]/IMAGE[?conf=FILE&id=USER] says; QEMU's own form has no slashes to join."""
    *namespace, image = unquote(url.path).strip("/").split("/")
    unknown = url.words.keys() - RBD_WORDS.keys()
    if len(namespace) > 1 or not image or unknown:
        why = "rbd://POOL/IMAGE was expected, or rbd://POOL/NAMESPACE/IMAGE, with ?conf=FILE and &id=USER at most"
        raise SourceError(url.shown, "not a URL of RBD", why)
    said = {"driver": "rbd", "pool": url.server, "image": image}
    if namespace:
        said["namespace"] = namespace[0]
    return said | {RBD_WORDS[word]: value for word, value in url.words.items()}


def _connected(
    name: str,
    what: str,
    image: list[str],
    settings: RemoteSettings,
    where: Hashable,
    base: Source | None,
    descriptor: int | None,
) -> ChildSource:
    program = shutil.which(PROGRAM)
    if program is None:
        hint = "install it (Debian: qemu-utils)"
        raise UnsupportedImage(name, what, f"QEMU reads it, and {PROGRAM} is not installed", hint=hint)
    try:
        from qcowfs.source.childsource import ChildSource
    except ImportError as error:
        raise lacking_library(name, what, "libnbd", error) from error
    command = [program, "--read-only", "--persistent", f"--shared={CLIENTS}", *image]
    source = ChildSource(name, command, descriptor, settings.patience, where)
    try:
        source.connect()
    except OSError as error:
        source.close()
        raise _failure(name, what, error.strerror or "") from error
    except BaseException:
        source.close()
        raise
    source.owns(base)
    log_news(source)
    return source


def _failure(name: str, what: str, said: str) -> SourceError | UnsupportedImage:
    if "Unknown driver" in said or "Unknown protocol" in said:
        hint = "install it (Debian: qemu-block-extra)"
        return UnsupportedImage(name, what, "QEMU's driver for it is not installed", hint=hint)
    said = re.sub(r"^Failed to blk_new_open '.*?': (?=Could not|\S)", "", said)
    return SourceError(name, f"cannot open {what}", f"QEMU says: {re.sub(r'/proc/self/fd/[0-9]+', 'it', said)}")
