"""Logical units of iSCSI targets: iscsi://[USER[%PASSWORD]@]HOST[:PORT]/TARGET/LUN, as libiscsi and QEMU write it.

Used by remote. The words of the URL and of the environment are libiscsi's, but are taken apart here: its own parser
cuts what is too long and trusts what it finds. `_iscsi` does the rest.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import time
from typing import TYPE_CHECKING, NoReturn
from urllib.parse import unquote_to_bytes

from qcowfs.errors import SourceError, UnsupportedImage, printable
from qcowfs.source.lanes import in_lanes
from qcowfs.source.news import log_news
from qcowfs.source.remote import Remote, RemoteSettings

if TYPE_CHECKING:
    from qcowfs._iscsi import Login, LunSource
    from qcowfs.source.url import Url

__all__ = ["open_url"]

SYNTAX = "iscsi://[USER[%PASSWORD]@]HOST[:PORT]/TARGET/LUN was expected"
CONNECTING = "Failed to connect"  # libiscsi's first words where it did not come as far as to log in
PORT = 3260
LARGEST_LUN = 16383  # of a flat address, SAM-5 4.7.7.3; libiscsi sends no other kind
WORDS = {"target_user", "target_password", "header_digest"}
# QEMU's own, so that a target's list of who may log in need not tell the two apart.
INITIATOR = "iqn.2008-11.org.linux-kvm"
TURN = 0.1  # seconds between two looks at Ctrl-C
_SERVER = re.compile(r"(\[[^\[\]]+\]|[^\[\]:]+)(?::(\d{1,5}))?")
_PATH = re.compile(r"/([^/]+)/(\d{1,5})")
_CONNECTING = re.compile(rf"{CONNECTING}[^()]*\((\d+)\)\.?")
_WORLDWIDE_NAA = b"\x02\x05\x06"  # assigned by the IEEE to one unit of the whole world; 3 is the administrator's own
_NAA, _EUI64 = 3, 2  # designator types

_LS = "`iscsi-ls -s iscsi://{server}` lists the targets there, and their LUNs (Debian: libiscsi-bin)"
_CHAP = (
    "write USER%PASSWORD@ before the host, or set LIBISCSI_CHAP_USERNAME and LIBISCSI_CHAP_PASSWORD in the environment"
)
_NAME = "this initiator is {initiator}; LIBISCSI_INITIATOR in the environment changes that"
# A word of libiscsi's reason, or of _iscsisession's -> errno, what failed, why (None: as it was told), what helps.
_REASONS = (
    ("Authentication fail", errno.EACCES, "cannot log in", "the user or the password is wrong, or missing", _CHAP),
    ("CHAP", errno.EACCES, "cannot log in", None, _CHAP),
    ("Authorization failure", errno.EACCES, "cannot log in", "the target does not let this initiator in", _NAME),
    ("Target not found", errno.ENOENT, "cannot log in", "there is no such target", _LS),
    ("no such LUN", errno.ENOENT, "cannot open the LUN", None, _LS),
    ("LOGICAL_UNIT_NOT_SUPPORTED", errno.ENOENT, "cannot open the LUN", "there is no such LUN", _LS),
    ("not a disk", errno.EMEDIUMTYPE, "cannot read the LUN", None, _LS),
)


def open_url(url: Url, settings: RemoteSettings) -> Remote:
    """Log in to the target of `url`, and return its LUN.

    Raises:
        UnsupportedImage: libiscsi is not installed.
        SourceError: no such host, target or LUN, a wrong password, no disk, or no answer.
    """
    source = _logged_in(url, settings)
    log_news(source, _worded)
    lanes = in_lanes(source, lambda: _logged_in(url, settings), lambda other: (other.identity, other.size))
    return Remote(source=lanes, near=True)


def _logged_in(url: Url, settings: RemoteSettings) -> LunSource:
    try:
        from qcowfs._iscsi import LunSource
    except ImportError as error:
        hint = "reinstall qcowfs where libiscsi is installed (Debian: libiscsi-dev, pip install qcowfs)"
        raise UnsupportedImage(url.shown, "the protocol iscsi", "libiscsi is not installed", hint=hint) from error
    login = _login(url)
    try:
        source = LunSource(url.shown, settings.patience, login)
    except ValueError as error:
        raise SourceError(url.shown, "cannot log in", str(error)) from error
    try:
        _connect(source, url, login, settings.patience)
        source.start()
        source.identity = _identity(login, source.facts)
    except BaseException:
        source.close()
        raise
    return source


def _login(url: Url) -> Login:
    """Take the URL apart, and find the addresses of its host."""
    secret, _, server = url.authority.rpartition("@")
    at, path = _SERVER.fullmatch(server), _PATH.fullmatch(url.path)
    if at is None or path is None or int(path[2]) > LARGEST_LUN or int(at[2] or PORT) > 65535:
        raise SourceError(url.shown, "no URL of a LUN", SYNTAX)
    words = _words(url)
    separator = "%" if "%" in secret else ":"
    user, _, password = secret.partition(separator)
    initiator = _chap(user, password, "") + _chap(words["target_user"], words["target_password"], "TARGET_")
    return {
        "initiator": os.fsencode(os.environ.get("LIBISCSI_INITIATOR") or INITIATOR),
        "target": unquote_to_bytes(path[1]),
        "user": initiator[0],
        "password": initiator[1],
        "target_user": initiator[2],
        "target_password": initiator[3],
        "portals": _portals(url, at[1].strip("[]"), int(at[2] or PORT)),
        "lun": int(path[2]),
        "header_digest": words["header_digest"],
    }


def _words(url: Url) -> dict[str, str]:
    """Return the words of the query, which libiscsi does not decode; those that are missing are empty."""
    words = dict.fromkeys(WORDS, "")
    for word, _, value in (part.partition("=") for part in url.query.split("&") if part):
        if word not in WORDS or (word == "header_digest" and value not in ("none", "crc32c")):
            why = "target_user=, target_password=, header_digest=none and header_digest=crc32c are known"
            raise SourceError(url.shown, "cannot do what it says after ?", why)
        words[word] = value
    return words


def _chap(user: str, password: str, kind: str) -> tuple[bytes, bytes]:
    """Return user and password, from the environment if they are not given; two empty words if one is missing."""
    user = user or os.environ.get(f"LIBISCSI_CHAP_{kind}USERNAME", "")
    password = password or os.environ.get(f"LIBISCSI_CHAP_{kind}PASSWORD", "")
    return (os.fsencode(user), os.fsencode(password)) if user and password else (b"", b"")


def _portals(url: Url, host: str, port: int) -> list[bytes]:
    """Return the addresses of `host` as libiscsi takes them."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        why = str(getattr(error, "strerror", None) or error)
        raise SourceError(url.shown, f"cannot find the host {host}", why) from error
    addresses = [str(address[0]) for _, _, _, _, address in found]
    return [(f"[{address}]:{port}" if ":" in address else f"{address}:{port}").encode() for address in addresses]


def _connect(source: LunSource, url: Url, login: Login, patience: float) -> None:
    """Log in, by the first address of the host that answers."""
    end = time.monotonic() + patience
    count = len(login["portals"])
    for number in range(count):
        share = (end - time.monotonic()) / (count - number)
        source.begin(number)
        try:
            _wait(source, share)
        except TimeoutError as error:
            reason: OSError = error
        except ConnectionError as error:
            reason = error
            if not str(error).startswith(CONNECTING):
                break
        else:
            return
    _refuse(url, login, str(reason))


def _wait(source: LunSource, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not source.connect(TURN):
        if time.monotonic() > end:
            raise TimeoutError(f"{CONNECTING} ({errno.ETIMEDOUT})")


def _refuse(url: Url, login: Login, reason: str) -> NoReturn:
    """Tell a person what libiscsi said."""
    connecting = _CONNECTING.match(reason)
    if connecting is not None:
        code = int(connecting[1])
        raise SourceError.from_oserror(url.shown, "cannot connect", OSError(code, os.strerror(code)))
    for word, code, what, why, hint in _REASONS:
        if word in reason:
            hint = hint.format(server=url.server, initiator=os.fsdecode(login["initiator"]))
            failure = SourceError(url.shown, what, why or _worded(reason), hint=hint)
            failure.errno = code
            raise failure
    raise SourceError(url.shown, "cannot log in", _worded(reason))


def _worded(reason: str) -> str:
    """Return a reason of libiscsi in one line of plain words; a target may have chosen some of them."""
    plain = _CONNECTING.sub(lambda found: f"cannot connect: {os.strerror(int(found[1]))}", reason)
    return printable(" ".join(plain.split()))


def _identity(login: Login, facts: tuple[int, bytes, bytes]) -> tuple[object, ...]:
    """Return what is equal for two names of one LUN, and for no two LUNs.

    A designator that the IEEE or a vendor assigned says it all. Others (tgt numbers its units from 1 on) are good only
    within a target, whose name is unique; a LUN without any is the one behind this address.
    """
    _, designator, serial = facts
    kind, naa = designator[1:2], designator[2:3]
    if kind and (kind[0] & 15 == _EUI64 or (kind[0] & 15 == _NAA and naa and naa[0] >> 4 in _WORLDWIDE_NAA)):
        return "scsi", designator
    if designator or serial:
        return "iscsi", login["target"], login["lun"], designator, serial
    return "iscsi", login["target"], login["lun"], login["portals"][0]
