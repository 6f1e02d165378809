"""Allow-list for Gradio's server: all other paths (uploads, recordings, proxies, streams, monitoring) give 404."""

from __future__ import annotations

import re
from typing import Any

from .access import Access

__all__ = ["Gate"]

_FILE_PATH = r"file=(?![\w+.-]{2,}:/).+"  # a local path: Gradio would download a URL and serve the result
_ALLOWED_PATHS = re.compile(
    r"/(config|theme\.css|favicon\.ico|manifest\.json|robots\.txt|(assets|static|svelte)/.+|gradio_api/("
    r"heartbeat/\w+|queue/join|queue/data|run/predict|cancel|reset|info|app_id|startup-events|theme\.css|"
    rf"{_FILE_PATH}))?/?"
)
_MAX_BYTES = 1_000_000  # per request: numbers and a prompt
_REJECTED = "This page has no such address, or the request is too large."


class Gate:
    """Outermost ASGI middleware: rejects requests that ``access`` refuses or the page does not need."""

    def __init__(self, app: Any, access: Access) -> None:
        self.app, self.access = app, access

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        if refusal is None:
            await self.app(scope, receive, send)
            return
        status, reason = refusal
        headers = [(b"content-type", b"text/plain; charset=utf-8")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": f"{reason}\n".encode()})

    def _refusal(self, scope: Any) -> tuple[int, str] | None:
        """HTTP status and reason of a refusal; None to pass the request on to Gradio."""
        headers = dict(scope["headers"])
        origin = headers.get(b"origin")
        host = headers.get(b"host", b"").decode("latin-1")
        if refusal := self.access.refusal(host, origin if origin is None else origin.decode("latin-1")):
            return refusal
        if not _ALLOWED_PATHS.fullmatch(scope["path"]):
            return 404, _REJECTED
        if b"transfer-encoding" in headers or int(headers.get(b"content-length", b"0")) > _MAX_BYTES:
            return 413, _REJECTED
        return None
