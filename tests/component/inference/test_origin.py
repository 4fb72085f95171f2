"""Which requests does the web server answer?"""

import asyncio

import pytest

from component.inference.origin import RequestCheck, is_own, own_names

NAMES = {"localhost", "box", "box.local", "0.0.0.0", "chat.example.org"}


def test_own_names(monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "Box")
    assert own_names("0.0.0.0", ["Chat.example.org."]) == NAMES


@pytest.mark.parametrize(
    "netloc",
    ["localhost:7860", "LOCALHOST", "a.localhost:1", "127.0.0.1:7860", "[::1]:7860", "192.168.1.5", "box:7860"],
)
def test_k19_hosts_answered(netloc):
    assert is_own(netloc, NAMES)


@pytest.mark.parametrize(
    "netloc",
    ["evil.com", "evil.com:7860", "localhost.evil.com", "127.0.0.1.evil.com", "evil.com@", "", "[::1", "notlocalhost"],
)
def test_k19_hosts_refused(netloc):
    assert not is_own(netloc, NAMES)


def answer(method: str = "GET", path: str = "/", kind: str = "http", **headers: str) -> tuple[list, list]:
    """(what the server behind the check was asked, what was sent)"""
    asked, sent = [], []

    async def app(scope, receive, send):
        asked.append(scope["path"])

    async def send(message):
        sent.append(message)

    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": kind, "method": method, "path": path, "headers": raw}
    asyncio.run(RequestCheck(app, {"localhost"}, {"chat.example.org"})(scope, None, send))
    return asked, sent


@pytest.mark.parametrize(
    ("method", "path", "headers"),
    [
        ("GET", "/", {"host": "localhost", "sec_fetch_site": "cross-site"}),  # a link on another page
        ("POST", "/run", {"host": "localhost", "sec_fetch_site": "same-origin", "content_length": "1"}),
        ("POST", "/run", {"host": "localhost", "sec_fetch_site": "none", "content_length": "1"}),
        ("GET", "/", {"host": "localhost:7860"}),
        ("POST", "/run", {"host": "localhost:7860", "origin": "http://localhost:7860", "content_length": "10000000"}),
        ("POST", "/gradio_api/upload", {"host": "127.0.0.1", "content_length": "51000000"}),
        ("POST", "/run", {"host": "127.0.0.1", "origin": "https://chat.example.org", "content_length": "1"}),
    ],
)
def test_answered(method, path, headers):
    assert answer(method, path, **headers) == ([path], [])


@pytest.mark.parametrize(
    ("method", "headers", "status", "message"),
    [
        ("GET", {"host": "evil.com"}, 403, "Host: 'evil.com' is no name of this server"),
        ("GET", {}, 403, "Host: '' is no name of this server"),
        ("POST", {"host": "localhost:1", "origin": "http://evil.com"}, 403, "Origin: 'http://evil.com' is another"),
        ("POST", {"host": "localhost:1", "origin": "http://localhost:2"}, 403, "Origin: 'http://localhost:2' is"),
        ("POST", {"host": "localhost:1", "origin": "null"}, 403, "Origin: 'null' is another site"),
        (
            "POST",
            {"host": "localhost:1", "sec_fetch_site": "cross-site"},
            403,
            "Sec-Fetch-Site: 'cross-site' is another",
        ),
        ("PUT", {"host": "localhost:1", "sec_fetch_site": "same-site"}, 403, "Sec-Fetch-Site: 'same-site' is another"),
        ("POST", {"host": "localhost"}, 411, "Content-Length: missing"),
        ("POST", {"host": "localhost", "content_length": "10000001"}, 413, "Content-Length: 10000001; the most is"),
    ],
)
def test_k19_refused(method, headers, status, message):
    asked, sent = answer(method, "/run", **headers)
    assert asked == []
    assert [part.get("status") for part in sent] == [status, None]
    assert sent[1]["body"].decode().startswith(message)


def test_k19_a_websocket_of_another_site():
    headers = {"host": "localhost", "origin": "http://evil.com"}
    assert answer(kind="websocket", **headers) == ([], [{"type": "websocket.close", "code": 1008}])
