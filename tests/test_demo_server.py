"""The demo app's web server: addresses, refused requests, headers and slow connections, over loopback sockets."""

import contextlib
import http.client
import socket
from urllib.parse import urlsplit

import pytest
import torch
from tiny_pipelines import save_flux

pytest.importorskip("gradio")

from dit_accel.demo.app import launch
from dit_accel.demo.ui.access import Access
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


def ask(app, method="GET", path="/config", body=None, **headers):
    """Status, headers and text."""
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
        assert ask(running)[0] == 200


@pytest.mark.parametrize("host", ["localhost", "localhost:1234", "LocalHost.", "127.0.0.1", "[::1]:7860"])
def test_loopback_host_is_served(app, host):
    assert ask(app, Host=host)[0] == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:7860", "192.168.1.5", "localhost.evil.example", "[::2]"]
)
def test_foreign_host_is_refused(app, host):
    status, _, text = ask(app, Host=host)
    assert status == 421 and f"--allow-host {host.removesuffix(':7860').strip('[]')}" in text and "{" not in text


@pytest.mark.parametrize("host", ["", "evil.example@localhost", "localhost/x", "a b", "[::1", "localhost:x"])
def test_malformed_host_is_refused(app, host):
    assert ask(app, Host=host)[0] in (400, 421)


@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
@pytest.mark.parametrize("origin", ["https://evil.example", "http://localhost:1", "null", "file://"])
def test_foreign_origin_is_refused(app, method, origin):
    status, headers, text = ask(
        app, method, "/gradio_api/run/predict", Origin=origin, Access_Control_Request_Method="GET"
    )
    assert status == 403 and "access-control-allow-origin" not in headers
    assert "--allow-host" in text


def test_own_origin_is_served(app):
    assert ask(app, Host="localhost:8080", Origin="http://localhost:8080")[0] == 200


def test_all_interfaces_accept_addresses_but_no_names(engine):
    with launched(engine, Access("0.0.0.0", ["box.local"])) as running:
        for host in ("192.168.1.5:7860", "[fe80::1]", "localhost", "box.local:7860"):
            assert ask(running, Host=host)[0] == 200, host
        assert ask(running, Host="evil.example")[0] == 421
        # a reverse proxy that passes its own name for the server on
        assert ask(running, Host="127.0.0.1:7860", Origin="https://box.local")[0] == 200
        assert ask(running, Host="192.168.1.5", Origin="http://192.168.1.6")[0] == 403


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
def test_security_headers_are_on_every_response(app, path, headers):
    found = ask(app, path=path, **headers)[1]
    assert found["X-Frame-Options"] == "SAMEORIGIN" and found["X-Content-Type-Options"] == "nosniff"
    assert "frame-ancestors 'self'" in found["Content-Security-Policy"] and found["Referrer-Policy"] == "same-origin"


def test_allowed_frame_replaces_the_header_that_cannot_name_it():
    headers = dict(Access("127.0.0.1", frames=["https://a.example"]).headers)
    assert "X-Frame-Options" not in headers
    assert headers["Content-Security-Policy"] == "frame-ancestors 'self' https://a.example"
