"""A client for an HTTP endpoint that implements OpenAI's chat completions, one question per call.

Not here: what is asked and how the reply is used (`judge.py`). The API key is sent in one request header and goes
nowhere else: never over plain HTTP except to this machine, never along a redirect, never into a message or a file. The
body of an error response is not shown, because servers may repeat the key there.
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from compress.errors import RecipeError

LOCAL = ("localhost", "127.0.0.1", "::1")
LARGEST = 1 << 20  # bytes of a reply
LONGEST_WAIT = 30.0  # seconds between two attempts
AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 529)  # statuses after which a retry may succeed
HOPELESS = (401, 403, 404, 405)  # statuses after which no question will be answered


class Unanswered(Exception):
    """Raised if the server gave no answer to one question; the message is a short reason, without the server's text."""


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """The address, model, timeout and retries of a chat-completions endpoint; `url` ends before `/chat/completions`.

    `timeout` is in seconds and applies to the connection and to the whole reply. `retries` are the attempts after the
    first; the wait before them starts at `pause` seconds and doubles each time, or is as long as the server asks, at
    most 30 seconds. Raises RecipeError for an address that would expose the key and for a malformed key.
    """

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    timeout: float = 60.0
    retries: int = 3
    pause: float = 1.0
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False)

    def __post_init__(self) -> None:
        check_url(self.url)
        if self.key is not None and not (self.key.isascii() and self.key.isprintable() and " " not in self.key):
            raise RecipeError("JUDGE_API_KEY: not a key; it must be printable ASCII without spaces")

    def ask(self, system: str, user: str) -> str:
        """The model's reply at temperature 0.

        Raises Unanswered if this question gets no answer, RecipeError if the endpoint would answer none.
        """
        body = {
            "model": self.model, "temperature": 0, "max_tokens": 1024,
            "messages": [{"role": "system", "content": system}, {"role": "user", "content": user}],
        }  # fmt: skip
        wait = self.pause
        for left in range(self.retries, -1, -1):
            try:
                return _text_of(self._post(json.dumps(body).encode()))
            except _Later as later:
                if not left:
                    raise Unanswered(later.reason) from None
                self.sleep(min(LONGEST_WAIT, max(wait, later.wait)))
                wait *= 2
        raise Unanswered("not tried")

    def _post(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        address = f"{self.url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(address, data=body, headers=headers, method="POST")
        try:
            with _opener(self.url).open(request, timeout=self.timeout) as reply:
                return _read(reply, time.monotonic() + self.timeout)
        except urllib.error.HTTPError as error:
            with error:
                raise _of_status(error, self.url) from None
        except TimeoutError:
            raise _Later("timeout") from None
        except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
            reason = getattr(error, "reason", error)
            raise _Later("timeout" if isinstance(reason, TimeoutError) else "no connection") from None


def check_url(url: str) -> None:
    """Raise RecipeError unless the address is https, or http to this machine.

    It must have no user name, password, query or fragment.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise RecipeError("--judge-url: is not a valid address") from None
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise RecipeError("--judge-url: give an address without user name, password, query or fragment")
    if not host or not (parts.scheme == "https" or (parts.scheme == "http" and host in LOCAL)):
        why = "the API key would be sent unencrypted"
        raise RecipeError(f"--judge-url: {url!r} is neither https://... nor http://localhost...: {why}")


class _Later(Exception):
    """Raised if the request is worth a retry after at least `wait` seconds."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.reason, self.wait = reason, wait


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """Return None, so that a redirect becomes an HTTPError with its status."""


def _opener(url: str) -> urllib.request.OpenerDirector:
    handlers: list[urllib.request.BaseHandler] = [_NoRedirects()]
    if urlsplit(url).hostname in LOCAL:  # a proxy would see the key
        handlers.append(urllib.request.ProxyHandler({}))
    return urllib.request.build_opener(*handlers)


def _read(reply: Any, deadline: float) -> bytes:
    """The whole reply; raises Unanswered if it is too long, TimeoutError if it is still arriving at the deadline."""
    content = b""
    while part := reply.read1(1 << 16):
        content += part
        if len(content) > LARGEST:
            raise Unanswered("reply too long")
        if time.monotonic() > deadline:
            raise TimeoutError
    return content


def _of_status(error: urllib.error.HTTPError, url: str) -> Exception:
    if error.code in HOPELESS:
        why = "the key in JUDGE_API_KEY is refused or missing" if error.code in (401, 403) else "nothing answers there"
        return RecipeError(f"--judge-url: {url} answered HTTP {error.code}: {why}")
    if error.code in AGAIN:
        asked = error.headers.get("Retry-After", "") if error.headers else ""
        return _Later(f"HTTP {error.code}", float(asked) if asked.isdecimal() else 0.0)
    return Unanswered(f"HTTP {error.code}")


def _text_of(content: bytes) -> str:
    try:
        text = json.loads(content)["choices"][0]["message"]["content"]
    except (ValueError, RecursionError, LookupError, TypeError):
        raise Unanswered("not a chat completion") from None
    if not isinstance(text, str):
        raise Unanswered("no text in the reply")
    return text
