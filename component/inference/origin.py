"""Which requests does the web server answer? Those for its own names, from its own pages, of bounded size.

A page of another site must not use a visitor's browser to reach this server. By DNS rebinding, its own name may point
to this machine, so the name in `Host` is checked; an address in digits can't be rebound. It may also send forms and
files from outside, so `Origin`, which browsers send with them, must be the host asked; where it was stripped,
`Sec-Fetch-Site`, which no page can set, must not name another site.
"""

import ipaddress
import socket
from collections.abc import Awaitable, Callable, Iterable
from typing import Any
from urllib.parse import urlsplit

MOST_UPLOAD_BYTES = 51_000_000  # the largest file, and the multipart form around it
MOST_BODY_BYTES = 10_000_000  # of other requests: a question

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict]]
Send = Callable[[dict], Awaitable[None]]


def own_names(host: str, more: Iterable[str] = ()) -> set[str]:
    """Names that `Host` may have: localhost, this machine's, the one listened on, and `more`."""
    machine = socket.gethostname()
    return {name.lower().rstrip(".") for name in ("localhost", machine, f"{machine}.local", host, *more)}


def is_own(netloc: str, names: set[str]) -> bool:
    """Whether `netloc` (host, or host:port) is one of `names`, below localhost, or an IP address."""
    try:
        name = (urlsplit(f"//{netloc}").hostname or "").rstrip(".")
    except ValueError:  # half of an IPv6 address
        return False
    if name in names or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class RequestCheck:
    """ASGI middleware that answers 403, 411 or 413 to what the server should not answer.

    Args:
        names: from `own_names`.
        proxied: names that visitors see if a proxy in front replaces `Host`; their pages may send to this server.
    """

    def __init__(self, app: Any, names: set[str], proxied: set[str]) -> None:
        self.app, self.names, self.proxied = app, names, proxied

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        refusal = self.refusal(scope)
        if refusal is None:
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            status, message = refusal
            headers = [(b"content-type", b"text/plain; charset=utf-8")]
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": message.encode()})

    def refusal(self, scope: Scope) -> tuple[int, str] | None:
        """(status, message), or None for a request to be answered."""
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get("host", "")
        if not is_own(host, self.names):
            return 403, f"Host: {host[:100]!r} is no name of this server; start web.py with --allowed_hosts NAME"
        if "origin" in headers and not self._is_same_site(headers["origin"], host):
            return 403, f"Origin: {headers['origin'][:100]!r} is another site than {host[:100]!r}"
        is_sending = scope["type"] == "websocket" or scope["method"] not in ("GET", "HEAD", "OPTIONS")
        site = headers.get("sec-fetch-site", "none")
        if is_sending and "origin" not in headers and site not in ("none", "same-origin"):
            return 403, f"Sec-Fetch-Site: {site[:100]!r} is another site than {host[:100]!r}"
        if scope["type"] == "http" and is_sending:
            most = MOST_UPLOAD_BYTES if scope["path"].rstrip("/").endswith("/upload") else MOST_BODY_BYTES
            length = headers.get("content-length", "")
            if not length.isascii() or not length.isdigit():
                return 411, "Content-Length: missing; send the length of the request's body"
            if int(length) > most:
                return 413, f"Content-Length: {length[:20]}; the most is {most} bytes"
        return None

    def _is_same_site(self, origin: str, host: str) -> bool:
        try:
            parts = urlsplit(origin)
            return parts.netloc.lower() == host.lower() or (parts.hostname or "") in self.proxied
        except ValueError:
            return False
