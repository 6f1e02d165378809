"""Gradio's web server with request checks, security headers and connection deadlines.

``Blocks.launch`` has no argument for any of them. ``gr.mount_gradio_app`` is no alternative: in a mounted app, Gradio
copies any file named in a request to the folder from which it serves files. So the server class is replaced during
``launch``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import uvicorn
from gradio import http_server

from .access import Access
from .connections import BoundedProtocol
from .gate import Gate

__all__ = ["guarded_server"]


@contextlib.contextmanager
def guarded_server(access: Access) -> Iterator[type[http_server.Server]]:
    """Make ``Blocks.launch`` start a server of the yielded class inside the context."""

    class GuardedServer(http_server.Server):
        def __init__(self, config: uvicorn.Config, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            config.app = Gate(config.app, access)  # outermost: Gradio's own middleware answers preflight requests
            config.http, config.ws = BoundedProtocol, "none"
            config.headers = access.headers  # uvicorn adds them to each response, including its own errors

    original = http_server.Server
    http_server.Server = GuardedServer  # type: ignore[misc]
    try:
        yield GuardedServer
    finally:
        http_server.Server = original  # type: ignore[misc]
