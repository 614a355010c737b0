"""URLs of images: what their parts are, what may be shown of them, and which of them lie beside each other.

Used by gate, policy, chain and the rooms of the protocols. Pure; any thread.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import parse_qsl, unquote, urlsplit

__all__ = ["Url", "is_url", "parse_url"]

# QEMU takes what stands before the first colon for a protocol (path_has_protocol); "scheme://" is what people write.
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
# Parsers differ in what they make of these: the URL that is judged must be the one that is opened.
_UNSURE = re.compile(r"[\x00-\x20\x7f\\]")
_PASSWORD = re.compile(r"[^/@]*@")
_PUBLIC_QUERY = frozenset(("socket",))  # other words of a query may be keys and signatures


@dataclass(frozen=True, slots=True)
class Url:
    """One URL.

    Attributes:
        text: as written, with whatever secrets it holds: for the library that opens it, never for messages.
        scheme: in lower case.
        authority: between "//" and the next "/", "?" or "#", as written.
        path: from the "/" after it, as written.
        query: after "?", as written.
    """

    text: str
    scheme: str
    authority: str
    path: str
    query: str

    @property
    def server(self) -> str:
        """The authority without user and password."""
        return self.authority.rpartition("@")[2]

    @property
    def words(self) -> dict[str, str]:
        """The query's words; of one that comes twice the last."""
        return dict(parse_qsl(self.query, keep_blank_values=True))

    @property
    def shown(self) -> str:
        """The URL for messages and logs, without password, key or signature."""
        secret = "...@" if _PASSWORD.match(self.authority) else ""
        query = [f"{word}={value}" if word in _PUBLIC_QUERY else f"{word}=..." for word, value in self.words.items()]
        return f"{self.scheme}://{secret}{self.server}{self.path}" + ("?" + "&".join(query) if query else "")

    @property
    def name(self) -> str:
        """What the image is called there: the last component of the path; of a LUN, its number and "lun" before.

        A server's default export has no name: it is called like the server, or like its socket.
        """
        last = self.path.rstrip("/").rpartition("/")[2]
        if self.scheme == "iscsi":
            return f"lun{last}"
        return last or self.server or self.words.get("socket", "").rpartition("/")[2]

    @property
    def directory(self) -> tuple[str, str, str, str]:
        """What is equal for two URLs side by side: files of one folder, LUNs of one target, exports of one server."""
        socket = self.words.get("socket", "")
        return self.scheme, self.server, self.path.rpartition("/")[0], socket

    @property
    def climbs(self) -> bool:
        """Whether a server may find it in another folder than the URL seems to say, once it has decoded the path."""
        parts = [unquote(part) for part in self.path.split("/")]
        return any("/" in part or part == ".." for part in parts)

    def beside(self, name: str) -> Url:
        """Return where a relative `name` leads from here, as QEMU joins the two: the query does not go with it."""
        folder = self.path.rpartition("/")[0]
        query = f"?{self.query}" if "socket" in self.words else ""
        return parse_url(f"{self.scheme}://{self.authority}{folder}/{name}{query}")

    def is_below(self, other: Url) -> bool:
        """Tell whether `other` is this URL, or a folder around it."""
        if (self.scheme, self.server) != (other.scheme, other.server) or self.climbs:
            return False
        folder = other.path.rstrip("/")
        same_socket = self.words.get("socket", "") == other.words.get("socket", "")
        return same_socket and (self.path == folder or self.path.startswith(folder + "/"))


def is_url(name: str) -> bool:
    """Tell whether `name` is a URL rather than a path."""
    return _URL.match(name) is not None


def parse_url(text: str) -> Url:
    """Return the parts of `text`.

    Raises:
        ValueError: it is no URL.
    """
    if not is_url(text):
        raise ValueError("not a URL")
    if _UNSURE.search(text):
        raise ValueError("a URL with a space, a backslash or a control character")
    parts = urlsplit(text)
    return Url(text, parts.scheme.lower(), parts.netloc, parts.path, parts.query)
