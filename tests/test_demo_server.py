"""The demo app's web server: addresses, refused requests, headers and slow connections, over loopback sockets."""

import contextlib
import http.client
import json
import re
import socket
import time
from urllib.parse import urlsplit

import pytest
import torch
from tiny_pipelines import save_flux

pytest.importorskip("gradio")

from dit_accel.demo.app import launch
from dit_accel.demo.ui.access import Access
from dit_accel.demo.ui.connections import BoundedProtocol
from dit_accel.demo.ui.engine import Engine


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    with Engine(str(save_flux(tmp_path_factory.mktemp("flux"))), torch.device("cpu"), torch.float32) as engine:
        yield engine


@contextlib.contextmanager
def launched(*arguments, **options):
    running = launch(*arguments, **options)
    try:
        yield running
    finally:
        running.close(verbose=False)


@pytest.fixture(scope="module")
def app(engine):
    with launched(engine) as running:
        yield running


def send(app, method="GET", path="/config", body=None, **headers):
    """Send a request; return status, headers and text."""
    url = urlsplit(app.local_url)
    connection = http.client.HTTPConnection(url.hostname, url.port, timeout=20)
    try:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read().decode(errors="replace")
    finally:
        connection.close()


def has_ipv6():
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 loopback")
def test_page_is_served_on_ipv6(engine):
    with launched(engine, Access("::1")) as running:
        assert urlsplit(running.local_url).hostname == "::1"
        assert send(running)[0] == 200


@pytest.mark.parametrize("host", ["localhost", "localhost:1234", "LocalHost.", "127.0.0.1", "[::1]:7860"])
def test_loopback_host_is_served(app, host):
    assert send(app, Host=host)[0] == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:7860", "192.168.1.5", "localhost.evil.example", "[::2]"]
)
def test_foreign_host_is_refused(app, host):
    status, _, text = send(app, Host=host)
    assert status == 421 and f"--allow-host {host.removesuffix(':7860').strip('[]')}" in text and "{" not in text


@pytest.mark.parametrize("host", ["", "evil.example@localhost", "localhost/x", "a b", "[::1", "localhost:x"])
def test_malformed_host_is_refused(app, host):
    assert send(app, Host=host)[0] in (400, 421)


@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
@pytest.mark.parametrize("origin", ["https://evil.example", "http://localhost:1", "null", "file://"])
def test_foreign_origin_is_refused(app, method, origin):
    status, headers, text = send(
        app, method, "/gradio_api/run/predict", Origin=origin, Access_Control_Request_Method="GET"
    )
    assert status == 403 and "access-control-allow-origin" not in headers
    assert "--allow-host" in text


def test_own_origin_is_served(app):
    assert send(app, Host="localhost:8080", Origin="http://localhost:8080")[0] == 200


def test_all_interfaces_accept_addresses_but_no_names(engine):
    with launched(engine, Access("0.0.0.0", ["box.local"])) as running:
        for host in ("192.168.1.5:7860", "[fe80::1]", "localhost", "box.local:7860"):
            assert send(running, Host=host)[0] == 200, host
        assert send(running, Host="evil.example")[0] == 421
        # a reverse proxy that forwards its own host name
        assert send(running, Host="127.0.0.1:7860", Origin="https://box.local")[0] == 200
        assert send(running, Host="192.168.1.5", Origin="http://192.168.1.6")[0] == 403


def test_space_is_served_by_its_names_and_framed_by_the_hub(monkeypatch):
    monkeypatch.setenv("SPACE_ID", "someone/demo")
    monkeypatch.setenv("SPACE_HOST", "someone-demo.hf.space,demo.example")
    access = Access("0.0.0.0")
    assert access.refusal("someone-demo.hf.space", "https://demo.example") is None
    assert access.refusal("other-demo.hf.space", None) is not None
    assert dict(access.headers)["Content-Security-Policy"] == "frame-ancestors 'self' https://huggingface.co"


def test_shared_address_is_served():
    access = Access("127.0.0.1")
    assert access.refusal("abc.gradio.live", None) is not None
    access.add("https://abc.gradio.live")
    assert access.refusal("abc.gradio.live", "https://abc.gradio.live") is None


@pytest.mark.parametrize("name", ["https://a.example", "a.example:80", "*.example", "", "a b"])
def test_allowed_host_must_be_a_name(name):
    with pytest.raises(ValueError, match="expected a host name"):
        Access("127.0.0.1", [name])


@pytest.mark.parametrize("origin", ["a.example", "https://a.example/x", "*", "https://a.example; sandbox", "ftp://a"])
def test_allowed_frame_must_be_an_origin(origin):
    with pytest.raises(ValueError, match="expected an origin"):
        Access("127.0.0.1", frames=[origin])


@pytest.mark.parametrize(
    "path, headers", [("/", {}), ("/config", {}), ("/nowhere", {}), ("/", {"Host": "evil.example"})]
)
def test_each_response_has_the_security_headers(app, path, headers):
    found = send(app, path=path, **headers)[1]
    assert found["X-Frame-Options"] == "SAMEORIGIN" and found["X-Content-Type-Options"] == "nosniff"
    assert "frame-ancestors 'self'" in found["Content-Security-Policy"] and found["Referrer-Policy"] == "same-origin"


def test_allowed_frame_removes_x_frame_options():
    headers = dict(Access("127.0.0.1", frames=["https://a.example"]).headers)
    assert "X-Frame-Options" not in headers
    assert headers["Content-Security-Policy"] == "frame-ancestors 'self' https://a.example"


def opened(app, count, text):
    """Open connections that have sent the text and stay open."""
    url, connections = urlsplit(app.local_url), []
    for _ in range(count):
        connections.append(socket.create_connection((url.hostname, url.port), timeout=10))
        connections[-1].sendall(text)
    return connections


def closed(connections, seconds):
    """Number of connections that the server has closed after `seconds`."""
    until, count = time.monotonic() + seconds, 0
    for connection in connections:
        connection.settimeout(max(until - time.monotonic(), 0.001))
        with contextlib.suppress(TimeoutError), connection:
            with contextlib.suppress(ConnectionResetError):
                while connection.recv(10_000):
                    pass
            count += 1
    return count


HEAD = b"POST /gradio_api/run/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
HALF_SENT = {
    "nothing": b"",
    "head": b"GET / HTTP/1.1\r\nHost: localhost\r\nX-",
    "body": HEAD + b"Content-Length: 1000\r\n\r\n{",
    "refused body": HEAD + b"Content-Length: 9000000\r\n\r\n{",
    "second request": b"GET /gradio_api/app_id HTTP/1.1\r\nHost: localhost\r\n\r\n"
    + HEAD
    + b"Content-Length: 1000\r\n\r\n{",
}


@pytest.fixture
def short_deadline(monkeypatch):
    monkeypatch.setattr(BoundedProtocol, "stall_seconds", 1.0)


@pytest.mark.parametrize("sent", HALF_SENT)
def test_half_sent_requests_are_closed_and_others_answered(app, short_deadline, sent):
    connections = opened(app, 50, HALF_SENT[sent])
    assert send(app)[0] == 200
    assert closed(connections, 6) == 50


def test_slowly_sent_request_is_closed(app, short_deadline):
    (connection,) = opened(app, 1, b"GET / HTTP/1.1\r\nHost: localhost\r\nX: ")
    begun = time.monotonic()
    with pytest.raises(OSError), connection:
        while time.monotonic() - begun < 6:
            connection.sendall(b"x")
            time.sleep(0.1)
    assert time.monotonic() - begun < 4


def test_slow_upload_that_makes_progress_is_answered(app, short_deadline):
    body = b'{"data": [], "fn_index": 0, "session_hash": "' + b"x" * 2500 + b'"}'
    (connection,) = opened(app, 1, HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body))
    with connection:
        for start in range(0, len(body), 500):  # for 3 s, three times the deadline, at twice the minimum rate
            time.sleep(0.5)
            connection.sendall(body[start : start + 500])
        assert connection.recv(100).startswith(b"HTTP/1.1 ")


def test_long_response_is_not_cut(app, short_deadline):
    (stream,) = opened(app, 1, b"GET /gradio_api/heartbeat/abc HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert closed([stream], 3) == 0


def test_keep_alive_connection_is_used_again(app, short_deadline):
    url = urlsplit(app.local_url)
    connection = http.client.HTTPConnection(url.hostname, url.port, timeout=10)
    with contextlib.closing(connection):
        for _ in range(4):
            connection.request("GET", "/gradio_api/app_id")
            local = connection.sock.getsockname()
            assert connection.getresponse().read()
            time.sleep(0.5)
        assert connection.sock.getsockname() == local


def test_connections_above_the_limit_replace_the_longest_pending(app, monkeypatch):
    monkeypatch.setattr(BoundedProtocol, "max_connections", 20)
    (stream,) = opened(app, 1, b"GET /gradio_api/heartbeat/abc HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert stream.recv(1000)
    waiting = opened(app, 60, b"GET / HTTP/1.1\r\n")
    assert send(app)[0] == 200
    assert closed(waiting[:45], 2) >= 40 and closed([stream], 0.2) == 0
    for connection in waiting:
        connection.close()


def post(app, path, **body):
    return send(app, "POST", path, json.dumps(body), Content_Type="application/json")


def events(app, queued):
    return [event for event in json.loads(send(app)[2])["dependencies"] if event["queue"] is queued]


def test_queue_cannot_be_bypassed(app):
    slow = events(app, queued=True)
    assert slow
    for event in slow:
        data = [None] * len(event["inputs"])
        status, _, text = post(app, "/gradio_api/run/predict", data=data, fn_index=event["id"], session_hash="abc")
        assert status == 404 and "join the queue" in text, event["api_name"]


@pytest.mark.parametrize("data", [[], ["x"], None, {"path": "/etc/passwd"}])
def test_bad_request_response_has_no_code_and_no_path(app, data):
    for event in json.loads(send(app)[2])["dependencies"]:
        each = [data] * len(event["inputs"]) if data else data
        answer = post(app, "/gradio_api/run/predict", data=each, fn_index=event["id"], session_hash="abc")
        assert not re.search(r"Traceback|\.py\b|site-packages|/tmp/", answer[2]), answer[2]
