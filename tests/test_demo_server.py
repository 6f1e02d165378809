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
    with launched(engine, host="::1") as running:
        assert urlsplit(running.local_url).hostname == "::1"
        assert ask(running)[0] == 200
