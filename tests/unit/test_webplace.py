"""Where a request to a web server goes: the parts of a URL, what is escaped, and which proxy is between."""

from __future__ import annotations

import pytest

from qcowfs.source.webplace import Proxies, parse_place, parse_proxy


@pytest.mark.parametrize(
    ("url", "netloc", "target"),
    [
        ("http://h/a", "h", "/a"),
        ("http://h", "h", "/"),
        ("http://h?q", "h", "/?q"),
        ("https://h:443/a", "h", "/a"),
        ("https://h:80/a", "h:80", "/a"),
        ("http://[::1]:8080/a", "[::1]:8080", "/a"),
        ("http://u:p@H/a", "h", "/a"),
        ("http://h/a b/%41%zz/é#fragment", "h", "/a%20b/%41%zz/%C3%A9"),
        ('http://h/"<>\\^`{|}', "h", "/%22%3C%3E%5C%5E%60%7B%7C%7D"),
        ("http://h/a//b/../c?x=%2F&y=a b", "h", "/a//b/../c?x=%2F&y=a%20b"),
    ],
)
def test_a_url_is_sent_as_it_is_written(url: str, netloc: str, target: str) -> None:
    place = parse_place(url)

    assert (netloc, target) == (place.netloc, place.target)
    assert f"{place.scheme}://{netloc}{target}" == place.url


@pytest.mark.parametrize("url", ["ftp://h/a", "http:///a", "http://h:x/a", "http://[h/a", "a", "", "http://h:99999/"])
def test_what_is_no_url_of_a_web_server_is_refused(url: str) -> None:
    with pytest.raises(ValueError):
        parse_place(url)


def test_user_and_password_may_hold_anything() -> None:
    assert "Basic dUB4OnA6L8Op" == parse_place("http://u%40x:p%3A%2F%C3%A9@h/").authorization
    assert "Basic dTo=" == parse_place("http://u@h/").authorization
    assert parse_place("http://h/").authorization is None


def test_a_proxy_may_be_named_without_a_scheme() -> None:
    assert "http://proxy:3128/" == getattr(parse_proxy("proxy:3128"), "url", None)
    assert parse_proxy("socks5://proxy:1080") is None


def test_what_no_proxy_names_is_asked_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("all_proxy", "https_proxy", "http_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("http_proxy", "http://me:secret@proxy:3128")
    monkeypatch.setenv("no_proxy", "near,.local")
    proxies = Proxies()
    far, near, secure = parse_place("http://far/a"), parse_place("http://near/a"), parse_place("https://far/a")

    assert ("proxy", 3128) == (proxies.connection(far, None).host, proxies.connection(far, None).port)
    assert ("near", 80) == (proxies.connection(near, None).host, proxies.connection(near, None).port)
    assert ("far", 443) == (proxies.connection(secure, None).host, proxies.connection(secure, None).port)
    assert ["http://far/a", "/a", "/a"] == [proxies.target(place) for place in (far, near, secure)]
    assert [{"Proxy-Authorization": "Basic bWU6c2VjcmV0"}, {}, {}] == [
        proxies.headers(place) for place in (far, near, secure)
    ]
