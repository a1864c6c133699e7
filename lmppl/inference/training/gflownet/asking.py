"""Posts a request to an HTTP server, with limits on time and size; every failure is a ConnectionError."""

from __future__ import annotations

import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from http.client import HTTPConnection, HTTPException, IncompleteRead
from typing import Any, Self

PAUSES = 0.05, 0.2, 0.8  # seconds before the next try
PASSING = {429, 500, 502, 503, 504}  # statuses that may soon change
LONGEST = 2e6  # seconds, 23 days: the longest wait of a socket
PIECE, SHOWN = 2**16, 300  # bytes read at once; bytes of an error message shown


class BadAnswer(ConnectionError, ValueError):
    """The server answered, but not what was requested."""


class _Passing(ConnectionError):
    """A failure that may soon pass."""


def ask(url: str, content: Any, *, api_key: str | None = None, timeout: float = 300.0, max_bytes: int = 2**26) -> bytes:
    """Posts ``content`` as JSON to ``url`` and returns the body of the answer.

    A server error (500, 502, 503, 504), 429 and a reset connection are tried again, up to three times and within the
    timeout.  Redirects are not followed, because they would send the content and the key to another server.

    :param timeout: seconds for everything, even if the server is slow.
    :param max_bytes: the longest answer.
    :raises ConnectionError: naming ``url``, where there is no answer, an error, or too long an answer.
    """
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
    request, deadline = urllib.request.Request(url, json.dumps(content).encode(), headers), time.monotonic() + timeout
    for pause in (*PAUSES, timeout):
        try:
            with _Watched(max(0.0, deadline - time.monotonic())) as watched:
                return _once(watched, request, timeout, max_bytes)
        except _Passing as error:
            if time.monotonic() + pause >= deadline:
                raise ConnectionError(str(error)) from error
        time.sleep(pause)
    raise AssertionError("the last pause is as long as the timeout")


def _once(watched: _Watched, request: urllib.request.Request, timeout: float, max_bytes: int) -> bytes:
    url, opener = request.full_url, urllib.request.build_opener(watched, _Stay)
    try:
        with opener.open(request, timeout=watched.seconds) as answer:
            return _read(answer, url, max_bytes, watched)
    except urllib.error.HTTPError as error:
        raise _refusal(error, url) from error
    except (OSError, HTTPException, ValueError) as error:
        if isinstance(error, BadAnswer):
            raise
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        if watched.is_late or isinstance(reason, TimeoutError):
            raise ConnectionError(f"url: no answer from {url} within {timeout:g} seconds") from error
        passes = isinstance(reason, ConnectionResetError | ConnectionAbortedError | BrokenPipeError)
        said = _line(f"{type(reason).__name__}: {reason}")
        raise (_Passing if passes else ConnectionError)(f"url: no answer from {url}: {said}") from error


def _read(answer: Any, url: str, max_bytes: int, watched: _Watched) -> bytes:
    found = bytearray()
    while piece := answer.read(PIECE):
        found += piece
        if len(found) > max_bytes:
            raise BadAnswer(f"url: the answer of {url} is longer than {max_bytes:,} bytes")
    if watched.is_late or answer.length:  # announced bytes that did not arrive
        raise IncompleteRead(bytes(found), answer.length)
    return bytes(found)


def _refusal(error: urllib.error.HTTPError, url: str) -> ConnectionError:
    if 300 <= error.code < 400:
        where = _line(error.headers.get("Location") or "nowhere")
        error.close()
        return ConnectionError(f"url: {url} redirects to {where}, which is not followed; pass that url if right")
    try:
        with error:
            said = _line(error.read(SHOWN).decode(errors="replace"))
    except (OSError, HTTPException, ValueError):
        said = "and no more"
    return (_Passing if error.code in PASSING else ConnectionError)(f"url: {url} answered {error.code}: {said}")


def _line(said: str) -> str:
    return " ".join(said.split())[:SHOWN]


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows no redirect."""

    def redirect_request(self, *args: Any) -> None:
        return None


class _Watched(urllib.request.HTTPSHandler, urllib.request.HTTPHandler):
    """Opens connections that are shut down after some seconds: a socket's own timeout is one of each read."""

    def __init__(self, seconds: float):
        super().__init__()
        self.seconds, self.is_late = min(max(seconds, 1e-3), LONGEST), False
        self.socket: socket.socket | None = None
        self.timer = threading.Timer(self.seconds, self._shut)
        self.timer.daemon = True

    def __enter__(self) -> Self:
        self.timer.start()
        return self

    def __exit__(self, *args: object) -> None:
        self.timer.cancel()

    def do_open(self, http_class: Callable[..., HTTPConnection], req: Any, **given: Any) -> Any:
        def made(*args: Any, **kwargs: Any) -> HTTPConnection:
            connection = http_class(*args, **kwargs)
            connect = connection.connect

            def connected() -> None:
                connect()
                self.socket = connection.sock
                if self.is_late:
                    self._shut()

            connection.connect = connected  # type: ignore[method-assign]
            return connection

        return super().do_open(made, req, **given)

    def _shut(self) -> None:
        self.is_late = True
        if self.socket is not None:
            try:  # the plain socket, below TLS
                socket.socket.shutdown(self.socket, socket.SHUT_RDWR)
            except OSError:  # it is closed already
                return
