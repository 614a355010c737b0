"""Where a request to a web server goes: the parts of its URL, and the proxy between.

Used by web. Any thread.
"""

from __future__ import annotations

import base64
import http.client
import ssl
from dataclasses import dataclass
from urllib.parse import quote, unquote, urlsplit
from urllib.request import getproxies_environment, proxy_bypass

__all__ = ["Place", "Proxies", "parse_place"]

_PORTS = {"http": 80, "https": 443}
_AS_WRITTEN = "%/:?#[]@!$&'()*+,;=-._~"  # RFC 3986: reserved, unreserved, and what is escaped already


@dataclass(frozen=True, slots=True)
class Place:
    """A URL, taken apart for a request.

    Attributes:
        target: path and query, escaped where a request line needs that.
        authorization: the header that its user and password make; None: it has none.
    """

    scheme: str
    host: str
    port: int
    target: str
    authorization: str | None

    @property
    def origin(self) -> tuple[str, str, int]:
        return self.scheme, self.host, self.port

    @property
    def netloc(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        # What is signed holds the Host header, and nobody writes the usual port into that.
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        """The URL without user and password."""
        return f"{self.scheme}://{self.netloc}{self.target}"


def parse_place(text: str) -> Place:
    """Take the URL `text` apart.

    Raises:
        ValueError: it is no URL of a web server.
    """
    parts = urlsplit(text)
    port = parts.port
    if parts.scheme not in _PORTS or not parts.hostname:
        raise ValueError("no URL of a web server")
    target = quote(parts.path or "/", safe=_AS_WRITTEN)
    if parts.query:
        target += "?" + quote(parts.query, safe=_AS_WRITTEN)
    authorization = _basic(parts.username, parts.password)
    return Place(parts.scheme, parts.hostname, port or _PORTS[parts.scheme], target, authorization)


class Proxies:
    """The proxies that the environment names: http_proxy, https_proxy, no_proxy."""

    def __init__(self) -> None:
        self._named = {scheme: parse_proxy(text) for scheme, text in getproxies_environment().items() if scheme != "no"}

    def connection(self, place: Place, context: ssl.SSLContext | None) -> http.client.HTTPConnection:
        """Return a connection to `place` that is not opened yet."""
        proxy = self._proxy(place)
        at = proxy or place
        if place.scheme == "http":
            return http.client.HTTPConnection(at.host, at.port)
        connection = http.client.HTTPSConnection(at.host, at.port, context=context)
        if proxy is not None:
            connection.set_tunnel(place.host, place.port, _proxy_headers(proxy))
        return connection

    def target(self, place: Place) -> str:
        """Return what the request line names: a proxy is told the whole URL, unless it only passes TLS on."""
        return place.url if place.scheme == "http" and self._proxy(place) else place.target

    def headers(self, place: Place) -> dict[str, str]:
        """Return what the proxy itself has to be told with a request."""
        proxy = self._proxy(place)
        return _proxy_headers(proxy) if proxy is not None and place.scheme == "http" else {}

    def _proxy(self, place: Place) -> Place | None:
        proxy = self._named.get(place.scheme) or self._named.get("all")
        return None if proxy is None or proxy_bypass(place.host) else proxy


def parse_proxy(text: str) -> Place | None:
    """Return where a proxy is; None for one of a kind that is not supported (SOCKS)."""
    try:
        return parse_place(text if "://" in text else f"http://{text}")
    except ValueError:
        return None


def _proxy_headers(proxy: Place) -> dict[str, str]:
    return {} if proxy.authorization is None else {"Proxy-Authorization": proxy.authorization}


def _basic(user: str | None, password: str | None) -> str | None:
    if user is None:
        return None
    pair = f"{unquote(user)}:{unquote(password or '')}"
    return "Basic " + base64.b64encode(pair.encode()).decode()
