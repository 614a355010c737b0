"""QEMU's own ways to name an image on a server, as the URL that says the same.

Used by filename. QEMU writes a URL into an image where one can say everything, else a json: name with the options of
its network drivers (block/nbd.c, block/iscsi.c, block/curl.c); "nbd:host:port" is older than its URLs. Nothing is
opened or looked at here. Pure; any thread.
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import quote

__all__ = ["DRIVERS", "from_legacy", "from_options"]

NBD_PORT = "10809"
DRIVERS = ("nbd", "iscsi", "http", "https")
HARMLESS = frozenset(("readahead", "timeout", "reconnect-delay", "header-digest"))  # how QEMU reads, not what

_UNIX = re.compile(r"nbd:unix:(?P<socket>[^:]+)(?::exportname=(?P<export>.*))?", re.DOTALL)
_TCP = re.compile(r"nbd:(?P<host>\[[^]]+\]|[^:/]+):(?P<port>\d+)(?::exportname=(?P<export>.*))?", re.DOTALL)


def from_legacy(text: str) -> str | None:
    """Return the URL of a name in the form nbd:unix:SOCKET or nbd:HOST:PORT; None if it has neither."""
    if match := _UNIX.fullmatch(text):
        return _nbd_unix(match["socket"], match["export"] or "")
    if match := _TCP.fullmatch(text):
        return _nbd_tcp(match["host"].strip("[]"), match["port"], match["export"] or "")
    return None


def from_options(driver: str, options: dict[str, Any]) -> str:
    """Return the URL of a json: name, and take what it says out of `options`; what is left there was not understood.

    Args:
        driver: one of DRIVERS.
        options: those of the protocol, without "file." before their names.

    Raises:
        ValueError: an option is missing or makes no sense.
    """
    for word in HARMLESS & options.keys():
        del options[word]
    if "filename" in options:
        return _text(options, "filename")
    if driver == "nbd":
        return _nbd(options)
    if driver == "iscsi":
        return _iscsi(options)
    return _text(options, "url")


def _nbd(options: dict[str, Any]) -> str:
    # The flat words are those of old versions.
    kind = options.pop("server.type", None)
    old = {"path": "unix", "host": "inet"}
    for word, meaning in old.items():
        if kind is None and word in options:
            kind = meaning
            options |= {f"server.{name}": options.pop(name) for name in ("path", "host", "port") if name in options}
    export = _text(options, "export", "")
    if kind == "unix":
        return _nbd_unix(_text(options, "server.path"), export)
    if kind == "inet":
        return _nbd_tcp(_text(options, "server.host"), _text(options, "server.port", NBD_PORT), export)
    raise ValueError(f"an NBD server of the type {kind}")


def _nbd_unix(socket: str, export: str) -> str:
    return f"nbd+unix:///{quote(export)}?socket={quote(socket)}"


def _nbd_tcp(host: str, port: str, export: str) -> str:
    return f"nbd://{_host(host)}:{port}/{quote(export)}"


def _host(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _iscsi(options: dict[str, Any]) -> str:
    if _text(options, "transport", "tcp") != "tcp":
        raise ValueError("a transport other than tcp")
    portal, target = _text(options, "portal"), _text(options, "target")
    user = _text(options, "user", "")
    options.pop("password-secret", None)  # an object of that QEMU; here the environment has the password
    return f"iscsi://{f'{user}@' if user else ''}{portal}/{target}/{_text(options, 'lun', '0')}"


def _text(options: dict[str, Any], name: str, default: str | None = None) -> str:
    value = options.pop(name, default)
    if type(value) is int:
        value = str(value)
    if not isinstance(value, str) or (not value and default is None):
        raise ValueError(f"no {name}")
    return value
