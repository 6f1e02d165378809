"""What of Gradio's server the page needs; all else is not found: uploads, recordings, proxies, streams, monitoring."""

from __future__ import annotations

import re
from typing import Any

__all__ = ["Gate"]

_FILE = r"file=(?![\w+.-]{2,}:/).+"  # a path: what a URL names Gradio would fetch and pass on
_NEEDED = re.compile(
    r"/(config|theme\.css|favicon\.ico|manifest\.json|robots\.txt|(assets|static|svelte)/.+|gradio_api/("
    r"heartbeat/\w+|queue/join|queue/data|run/predict|cancel|reset|info|app_id|startup-events|theme\.css|"
    rf"{_FILE}))?/?"
)
_MOST_BYTES = 1_000_000  # of a request: numbers and a prompt


class Gate:
    """ASGI middleware."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        status = _refusal(scope) if scope["type"] == "http" else None
        if status is None:
            await self.app(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": b"Not for this page."})


def _refusal(scope: Any) -> int | None:
    """The HTTP status to answer with; None where the request goes on to Gradio."""
    if not _NEEDED.fullmatch(scope["path"]):
        return 404
    headers = dict(scope["headers"])
    if b"transfer-encoding" in headers or int(headers.get(b"content-length", b"0")) > _MOST_BYTES:
        return 413
    return None
