"""Who may ask, how much and how long; and clients that stall."""

import json
import socket
import threading
from urllib.parse import urlsplit

import pytest

from dllm.serving import connection
from dllm.serving.guard import LOOPBACK, Limits
from tests.serving.serial import SerialEngine
from tests.serving.servers import TURNS, ask, running, served

CHAT = "/v1/chat/completions"
HELLO = {"model": "toy", "messages": TURNS}
KEY = "a key of sixteen".replace(" ", "-")


@pytest.fixture(scope="module")
def guarded(taught):
    """A server with a key that goes by the names of this machine, takes small bodies and waits for none."""
    options = {"key": KEY.encode(), "hosts": frozenset(LOOPBACK), "limits": Limits(body=2000, body_seconds=0.5)}
    with running([served(taught)], **options) as server:
        yield server


def with_key(**headers: str) -> dict[str, str]:
    return {"authorization": f"Bearer {KEY}"} | headers


def raw(url: str, data: bytes, *, closes: bool = True) -> bytes:
    """What comes back for bytes, until the server closes."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), timeout=30) as made:
        made.sendall(data)
        found = b""
        while closes and (more := made.recv(65536)):
            found += more
        return found


@pytest.mark.parametrize(
    "said", ["", "Bearer", f"Bearer {KEY[:-1]}", f"Bearer {KEY}x", KEY, f"Basic {KEY}", "Bearer é"]
)
def test_only_the_key_opens(guarded, said):
    headers = {"authorization": said.encode("latin-1")} if said else {}
    for path, body in ((CHAT, HELLO), ("/v1/models", None), ("/metrics", None), ("/v1/nothing", None)):
        answer = ask(guarded.url, path, body, headers=headers)
        assert answer.status == 401 and answer.error["code"] == "invalid_api_key"


def test_the_key_opens_and_pages_need_none(guarded):
    assert ask(guarded.url, CHAT, HELLO, headers=with_key()).status == 200
    assert ask(guarded.url, CHAT, HELLO, headers={"authorization": f"bearer {KEY}"}).status == 200
    for path in ("/health", "/ready", "/docs", "/openapi.json", "/"):
        assert ask(guarded.url, path).status in (200, 307)


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost.", "", "[", "a:b:c"]
)
def test_another_name_of_this_machine_is_refused(guarded, host):
    answer = ask(guarded.url, CHAT, HELLO, headers=with_key(Host=host))
    assert answer.status in (400, 421)


@pytest.mark.parametrize("host", ["localhost", "localhost:1", "127.0.0.1:8000", "[::1]:8000", "LOCALHOST"])
def test_its_own_names_are_taken_at_any_port(guarded, host):
    assert ask(guarded.url, CHAT, HELLO, headers=with_key(Host=host)).status == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:9"},
        {"Origin": ""},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_a_page_of_another_site_may_not_ask(guarded, headers):
    answer = ask(guarded.url, CHAT, HELLO, headers=with_key(**headers))
    assert answer.status == 403 and answer.error["code"] == "cross_origin"
    assert "access-control-allow-origin" not in answer.headers


def test_its_own_page_may_ask(guarded):
    headers = with_key(Origin=guarded.url, **{"Sec-Fetch-Site": "same-origin"})
    assert ask(guarded.url, CHAT, HELLO, headers=headers).status == 200


def test_nobody_is_told_that_another_site_may_ask(guarded):
    headers = with_key(Origin="http://evil.example", **{"Access-Control-Request-Method": "POST"})
    answer = ask(guarded.url, CHAT, method="OPTIONS", headers=headers)
    assert answer.status >= 400
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_a_body_that_is_too_large_is_refused_whether_it_says_so_or_not(guarded):
    large = json.dumps(HELLO | {"user": "x" * 3000})
    assert ask(guarded.url, CHAT, large, headers=with_key()).status == 413
    head = (
        f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {KEY}\r\ncontent-type: application/json\r\n"
    )
    parts = b"".join(b"400\r\n" + b"x" * 1024 + b"\r\n" for _ in range(3))
    assert b" 413 " in raw(guarded.url, head.encode() + b"transfer-encoding: chunked\r\n\r\n" + parts)


@pytest.mark.parametrize(
    "headers, status",
    [
        (with_key(), 413),
        ({}, 401),
        (with_key(Host="evil.example"), 421),
        (with_key(Origin="http://evil.example"), 403),
        (with_key(**{"content-type": "text/plain"}), 413),
    ],
)
def test_a_client_that_sends_all_before_it_reads_is_told_why_it_is_refused(guarded, headers, status):
    large = json.dumps(HELLO | {"user": "x" * 2**24})
    assert ask(guarded.url, CHAT, large, headers=headers).status == status


def test_a_body_that_is_promised_and_does_not_come_is_not_waited_for_long(guarded):
    head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 100\r\n"
    for more in ("", "expect: 100-continue\r\n"):
        assert raw(guarded.url, f"{head}{more}\r\n".encode()).startswith(b"HTTP/1.1 401 ")


@pytest.mark.parametrize("method", ["OPTIONS", "DELETE", "PUT", "PATCH", "get"])
def test_another_method_is_refused_as_such_whatever_its_body_is(guarded, method):
    for path, allowed in ((CHAT, "POST"), ("/v1/models/toy", "GET"), ("/", "GET")):
        answer = ask(guarded.url, path, method=method, headers=with_key())
        assert answer.status == 405 and allowed in answer.headers["allow"]
        assert answer.error["code"] == "method_not_allowed"
    assert ask(guarded.url, "/v1/nothing", method=method, headers=with_key()).status == 404


def test_a_body_that_is_packed_is_refused_by_name(guarded):
    headers = with_key(**{"content-encoding": "gzip"})
    answer = ask(guarded.url, CHAT, HELLO, headers=headers)
    assert answer.status == 415 and "gzip" in answer.error["message"]
    assert ask(guarded.url, CHAT, HELLO, headers=with_key(**{"content-encoding": "identity"})).status == 200


def test_a_body_that_stalls_is_cut_off(guarded):
    head = (
        f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {KEY}\r\ncontent-type: application/json\r\n"
    )
    said = raw(guarded.url, head.encode() + b'content-length: 100\r\n\r\n{"model":')
    assert b" 408 " in said and json.loads(said.split(b"\r\n\r\n")[1])["error"]["code"] == "request_timeout"
    assert guarded.server.gate.busy == 0


def test_what_is_no_http_is_refused_in_the_same_shape(guarded):
    said = raw(guarded.url, b"GET\r\n\r\n")
    assert b" 400 " in said and json.loads(said.split(b"\r\n\r\n")[1])["error"]["code"] == "invalid_http"


@pytest.mark.parametrize("begun", [b"", b"GET /hea", b"GET /health HTTP/1.1\r\nhost: localhost\r\n"])
def test_a_head_that_stalls_is_cut_off(taught, monkeypatch, begun):
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.3)
    with running([served(taught)]) as server:
        try:
            assert raw(server.url, begun) == b""
        except ConnectionResetError:
            pass
        whole = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
        try:  # also behind an answered request
            assert raw(server.url, whole + begun).count(b"200 OK") == 1
        except ConnectionResetError:
            pass


def test_a_client_that_does_not_read_is_cut_off_and_its_rows_are_freed(taught, monkeypatch):
    monkeypatch.setattr(connection, "READ_SECONDS", 0.3)
    engine = SerialEngine(taught)
    from dllm.serving.events import Snapshot

    endless = threading.Event()

    def events():
        step = 0
        while not endless.wait(0.0005):
            step += 1
            yield 0, Snapshot(step, ("x" * 5000,) * 16, (), (0.5,) * 16, (), "")

    engine.answer = lambda prompt, settings, *, on_event, **_: engine._take(events, on_event)
    with running([served(taught, engine=engine)]) as server:
        body = json.dumps(HELLO | {"stream": True, "canvas": True}).encode()
        head = (
            f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        parts = urlsplit(server.url)
        with socket.create_connection((parts.hostname, parts.port), timeout=30) as made:
            made.sendall(head.encode() + body)
            for _ in range(400):
                if engine.stats().cancelled:
                    break
                endless.wait(0.05)
        endless.set()
        assert engine.stats().cancelled == 1
