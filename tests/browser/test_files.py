"""Requests cannot read or write files outside the temporary folder of the app."""

import http.client
import json
import os

import pytest
from driving import draw, pictures, set_drawing

SECRET = "root:"  # in /etc/passwd
OWN = os.path.abspath(__file__)
TARGETS = [
    "/etc/passwd", "../../../../etc/passwd", "..%2f..%2f..%2f..%2fetc%2fpasswd", "%2fetc%2fpasswd",
    "file:///etc/passwd", OWN, "http://127.0.0.1:1/x",
]  # fmt: skip
PREFIXES = [
    "/gradio_api/file=", "/file=", "/gradio_api/file/", "/gradio_api/stream/", "/gradio_api/proxy=", "/static/",
    "/assets/", "/svelte/", "/",
]  # fmt: skip


def send(app, method, path, body=None, **headers):
    """Send a request with the path unchanged, as HTTP clients would normalize it; return status and text."""
    host = http.client.HTTPConnection(app.url.removeprefix("http://"), timeout=20)
    try:
        host.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        answer = host.getresponse()
        return answer.status, answer.read().decode(errors="replace")
    finally:
        host.close()


def files_of(app):
    return sorted(path for path in app.folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("prefix", PREFIXES)
def test_files_outside_the_app_are_not_served(app, prefix):
    for target in TARGETS:
        status, text = send(app, "GET", prefix + target)
        assert status >= 400 and SECRET not in text and "SECRET" not in text, target


def test_only_shown_files_of_the_app_folder_are_served(app, page):
    set_drawing(page, side=128, steps=1)
    draw(page)
    assert pictures(page)[0].shape == (128, 128, 3)
    kept = app.folder / "kept"
    kept.write_text("secret")
    for path in (kept, app.folder, f"{app.folder}/page/../kept", f"{app.folder}/page/%2e%2e/kept"):
        assert send(app, "GET", f"/gradio_api/file={path}")[0] >= 400, path
    kept.unlink()


@pytest.mark.parametrize("name", ["x.txt", "../../evil.txt", "/etc/evil.txt"])
@pytest.mark.parametrize("prefix", ["/gradio_api/upload", "/upload", "/gradio_api/process_recording"])
def test_uploads_are_refused(app, prefix, name):
    before = files_of(app)
    part = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\nevil\r\n--x--\r\n'
    status, _ = send(app, "POST", prefix, part, Content_Type="multipart/form-data; boundary=x")
    assert status == 404 and files_of(app) == before and not os.path.exists("/etc/evil.txt")


@pytest.mark.parametrize("prefix", ["/gradio_api/queue/join", "/gradio_api/run/predict"])
@pytest.mark.parametrize(
    "key, named", [("path", "/etc/passwd"), ("url", "/etc/passwd"), ("url", "http://example.com/")]
)
def test_file_names_in_payloads_are_refused(app, prefix, key, named):
    """Each event of the page gets a file in place of each input.

    The fixture of the app checks that no other machine is contacted.
    """
    file = {key: named, "orig_name": "passwd", "meta": {"_type": "gradio.FileData"}}
    for event in json.loads(send(app, "GET", "/config")[1])["dependencies"]:
        body = {"data": [file] * len(event["inputs"]), "fn_index": event["id"], "session_hash": f"evil{key}"}
        assert SECRET not in send(app, "POST", prefix, json.dumps(body), Content_Type="application/json")[1]
    assert not any(SECRET in path.read_text(errors="ignore") for path in files_of(app))


def test_long_request_is_refused(app):
    assert send(app, "POST", "/gradio_api/run/predict", b" " * 2_000_000)[0] == 413


def test_app_listens_on_loopback_only(app):
    port = f":{int(app.url.rsplit(':', 1)[1]):04X}"
    with open("/proc/net/tcp") as tcp:
        listening = [line.split()[1] for line in tcp if line.split()[1].endswith(port) and line.split()[3] == "0A"]
    assert listening == [f"0100007F{port}"]
