"""A question to a server: what is asked again, what is given up, and that every failure is a ConnectionError."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

from lmppl.inference.training.gflownet.asking import BadAnswer, ask

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
Behaviour = Callable[[socket.socket, threading.Event], None]


class Server:
    """Reads a request and behaves; what comes after the last behaviour is as it."""

    def __init__(self, *behaviours: Behaviour | bytes):
        self.behaviours, self.heard, self.over = behaviours, [], threading.Event()

    @contextmanager
    def running(self) -> Iterator[str]:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.settimeout(0.05)
            thread = threading.Thread(target=self._serve, args=(listener,))
            thread.start()
            try:
                yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1/completions"
            finally:
                self.over.set()
                thread.join()

    def _serve(self, listener: socket.socket) -> None:
        while not self.over.is_set():
            with suppress(OSError), listener.accept()[0] as connection:  # a timeout, or a client that has gone
                connection.settimeout(1.0)
                self.heard.append(self._request(connection))
                behave = self.behaviours[min(len(self.heard), len(self.behaviours)) - 1]
                connection.sendall(behave) if isinstance(behave, bytes) else behave(connection, self.over)

    @staticmethod
    def _request(connection: socket.socket) -> str:
        said = b""
        while b"\r\n\r\n" not in said:
            said += Server._received(connection)
        head, _, body = said.partition(b"\r\n\r\n")
        size = next(int(x.split(b":")[1]) for x in head.split(b"\r\n") if x.lower().startswith(b"content-length"))
        while len(body) < size:
            body += Server._received(connection)
        return (head + b"\r\n\r\n" + body).decode()

    @staticmethod
    def _received(connection: socket.socket) -> bytes:
        some = connection.recv(4096)
        if not some:
            raise ConnectionError("the client has gone")
        return some


def status(code: int, *headers: str, body: str = "sorry") -> bytes:
    lines = [f"HTTP/1.1 {code} Some", f"Content-Length: {len(body)}", *headers, "", body]
    return "\r\n".join(lines).encode()


def dripping(start: bytes, drop: bytes) -> Behaviour:
    def behave(connection: socket.socket, over: threading.Event) -> None:
        connection.sendall(start)
        while not over.wait(0.02):
            connection.sendall(drop)

    return behave


def flooding(start: bytes, piece: bytes) -> Behaviour:
    def behave(connection: socket.socket, over: threading.Event) -> None:
        connection.sendall(start)
        while not over.is_set():
            connection.sendall(piece)

    return behave


def resetting(connection: socket.socket, over: threading.Event) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_redirect_takes_nothing_elsewhere(code, host):
    other = Server(OK)
    with other.running() as elsewhere:
        where = elsewhere.replace("127.0.0.1", host)
        server = Server(status(code, f"Location: {where}"))
        with server.running() as url, pytest.raises(ConnectionError, match=f"url: {url} redirects to {where}"):
            ask(url, {}, api_key="secret", timeout=5.0)
    assert other.heard == []


@pytest.mark.parametrize("timeout", [1e7, 1e300])
def test_a_timeout_beyond_what_a_socket_can_wait_is_as_long_as_it_can(timeout):
    server = Server(OK)
    with server.running() as url:
        assert ask(url, {}, timeout=timeout) == b"{}"


def test_the_key_is_sent_to_the_url_itself():
    server = Server(OK)
    with server.running() as url:
        assert ask(url, {"a": [1]}, api_key="secret") == b"{}"
    assert "Authorization: Bearer secret\r\n" in server.heard[0] and json.loads(server.heard[0].split("\r\n\r\n")[1])


@pytest.mark.parametrize(
    "behaviour",
    [
        dripping(b"", b""),  # nothing at all
        dripping(b"HTTP/1.1 200", b" "),  # within the status line
        dripping(b"HTTP/1.1 200 OK\r\nA: ", b"b"),  # within the headers
        dripping(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        dripping(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n", b" "),
        dripping(b"HTTP/1.1 200 OK\r\n\r\n", b" "),  # as long as the connection lasts
        dripping(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
        dripping(b"HTTP/1.1 400 No\r\nContent-Length: 1000000\r\n\r\n", b"x"),
        dripping(b"HTTP/1.1 500 No\r\nContent-Length: 1000000\r\n\r\n", b"x"),
    ],
)
def test_a_slow_server_is_given_up_at_the_timeout(behaviour):
    """A byte every fiftieth of a second, so that no read takes long."""
    with Server(behaviour).running() as url:
        started = time.monotonic()
        with pytest.raises(ConnectionError, match=f"url: .*{url}"):
            ask(url, {}, timeout=0.3)
        assert 0.25 < time.monotonic() - started < 1.5


@pytest.mark.parametrize(
    "behaviour",
    [
        flooding(b"HTTP/1.1 200 OK\r\n\r\n", b" " * 4096),
        flooding(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n", b" " * 4096),
        flooding(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1000\r\n" + b" " * 4096 + b"\r\n"),
    ],
)
def test_a_long_answer_is_given_up(behaviour):
    with Server(behaviour).running() as url:
        started = time.monotonic()
        with pytest.raises(BadAnswer, match=f"url: the answer of {url} is longer than 1,000,000 bytes"):
            ask(url, {}, max_bytes=1_000_000)
        assert time.monotonic() - started < 5


def test_an_answer_as_long_as_it_may_be_is_read():
    with Server(status(200, body="x" * 200_000)).running() as url:
        assert len(ask(url, {}, max_bytes=200_000)) == 200_000


@pytest.mark.parametrize(
    ("said", "word"),
    [
        (b"nonsense\r\n\r\n", "BadStatusLine"),
        (b"HTTP/1.1 abc OK\r\n\r\n", "BadStatusLine"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{", "IncompleteRead"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "IncompleteRead"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab", "IncompleteRead"),
        (b"HTTP/1.1 200 OK\r\nA: " + b"b" * 70_000 + b"\r\n\r\n", "LineTooLong"),
        (b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 200 + b"\r\n", "HTTPException"),
        (status(400, body="no \n such model"), "answered 400: no such model"),
        (status(401), "answered 401"),
        (status(404), "answered 404"),
    ],
)
def test_a_broken_answer_is_a_connection_error_and_asked_for_once(said, word):
    server = Server(said)
    with server.running() as url:
        with pytest.raises(ConnectionError, match=f"url: .*{url}.*{word}") as found:
            ask(url, {}, timeout=5.0)
        assert "\n" not in str(found.value) and len(str(found.value)) < 500
    assert len(server.heard) == 1


@pytest.mark.parametrize("code", [429, 500, 502, 503, 504])
def test_what_may_pass_is_asked_again(code):
    server = Server(status(code), status(code), OK)
    with server.running() as url:
        assert ask(url, {}) == b"{}"
    assert len(server.heard) == 3 and len(set(server.heard)) == 1


@pytest.mark.parametrize("gone", [resetting, b""])
def test_a_connection_that_breaks_is_made_again(gone):
    server = Server(gone, gone, OK)
    with server.running() as url:
        assert ask(url, {}) == b"{}"
    assert len(server.heard) == 3


@pytest.mark.parametrize(("behaviour", "word"), [(status(503), "answered 503: sorry"), (resetting, "Connection")])
def test_what_does_not_pass_is_given_up(behaviour, word):
    """After three pauses, or where the next one would outlast the timeout."""
    server = Server(behaviour)
    with server.running() as url:
        with pytest.raises(ConnectionError, match=word):
            ask(url, {}, timeout=5.0)
        assert len(server.heard) == 4
        with pytest.raises(ConnectionError, match=word):
            ask(url, {}, timeout=0.2)
        assert len(server.heard) == 6
