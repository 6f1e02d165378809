"""Gradio's web server with what it lacks: checks before Gradio sees a request, headers, deadlines for connections.

``Blocks.launch`` has no argument for any of them. ``gr.mount_gradio_app`` is no alternative: in a mounted app, Gradio
copies any file that a request names to where it serves files from. So the server's class is replaced during ``launch``.
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
    """Within the context, ``Blocks.launch`` starts a server of the class that is yielded."""

    class GuardedServer(http_server.Server):
        def __init__(self, config: uvicorn.Config, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            config.app = Gate(config.app, access)  # outermost: before Gradio's own answers to preflight requests
            config.http, config.ws = BoundedProtocol, "none"
            config.headers = access.headers  # uvicorn puts them on every response, its own too

    gradios = http_server.Server
    http_server.Server = GuardedServer  # type: ignore[misc]
    try:
        yield GuardedServer
    finally:
        http_server.Server = gradios  # type: ignore[misc]
