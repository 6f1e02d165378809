"""Host names, origins and framing pages that the app accepts.

A page of another site can point its own name at this machine (DNS rebinding) and can send requests to it; only the
``Host`` and ``Origin`` headers tell them from the app's own. An address in ``Host`` cannot be rebound.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from ipaddress import ip_address
from urllib.parse import urlsplit

__all__ = ["Access"]

_HOST = re.compile(r"(\[[\da-f:.]+\]|[a-z\d_.-]{1,253})(:\d{1,5})?", re.IGNORECASE)
_NAME = re.compile(r"[a-z\d_]([a-z\d_.-]{0,251}[a-z\d_])?", re.IGNORECASE)
_FRAME = re.compile(r"https?://(\[[\da-f:.]+\]|(\*\.)?[a-z\d_.-]+)(:\d{1,5})?", re.IGNORECASE)


class Access:
    """Rules for ``Host``, ``Origin`` and frames.

    Accepted hosts: localhost, 127.0.0.1, [::1], ``host``, ``names`` and, if ``host`` is 0.0.0.0 or ::, every address.
    In a Hugging Face Space also its own names, and the Hub may show the page in a frame.

    Args:
        host: address or name the server listens on.
        names: further names or addresses the page is reached by.
        frames: origins whose pages may show it in a frame, such as ``https://example.com``.
    Raises: ValueError: no host name, or no origin.
    """

    def __init__(self, host: str = "127.0.0.1", names: Iterable[str] = (), frames: Iterable[str] = ()) -> None:
        self.host = host.strip("[]")
        self._every_address = (address := _address(self.host)) is not None and ip_address(address).is_unspecified
        self._own = {"localhost", "127.0.0.1", "::1", _plain(_name(self.host))}
        self._given = {_plain(_name(name)) for name in names}
        self._frames = [_frame(origin) for origin in frames]
        if "SPACE_ID" in os.environ:
            self._given.update(map(_plain, filter(None, os.environ.get("SPACE_HOST", "").split(","))))
            self._frames.append("https://huggingface.co")

    def add(self, url: str) -> None:
        """Accept the host of an address."""
        self._given.add(_plain(urlsplit(url).hostname or ""))

    def refusal(self, host: str, origin: str | None) -> tuple[int, str] | None:
        """HTTP status and reason to refuse a request with these headers; None = accept it."""
        found = _HOST.fullmatch(host)
        if found is None:
            return 400, "The request's Host header is malformed."
        name = _plain(found[1])
        if not (name in self._own | self._given or (self._every_address and _address(name))):
            reason = f"This page is not served under the name {name}. If you reach it by that name"
            return 421, f"{reason}, start it with --allow-host {name}"
        if origin is None or self._is_own(origin, host):
            return None
        return 403, (
            "This page takes no requests from pages of other sites. If a proxy serves it under another name, start it "
            "with --allow-host NAME"
        )

    def _is_own(self, origin: str, host: str) -> bool:
        scheme, _, netloc = origin.partition("://")
        found = _HOST.fullmatch(netloc)
        if scheme not in ("http", "https") or found is None:
            return False
        return netloc.lower() == host.lower() or _plain(found[1]) in self._given

    @property
    def headers(self) -> list[tuple[str, str]]:
        """Headers of every response."""
        policy = " ".join(["frame-ancestors", "'self'", *self._frames])
        headers = [
            ("Content-Security-Policy", policy),
            ("X-Content-Type-Options", "nosniff"),
            ("Referrer-Policy", "same-origin"),
        ]
        if not self._frames:  # it can name no other site
            headers.append(("X-Frame-Options", "SAMEORIGIN"))
        return headers


def _address(name: str) -> str | None:
    """IP address in its shortest spelling; None if the name is none."""
    try:
        return str(ip_address(name))
    except ValueError:
        return None


def _plain(name: str) -> str:
    """One spelling of a name or address."""
    name = name.lower().strip("[]").removesuffix(".")
    return _address(name) or name


def _name(name: str) -> str:
    if _NAME.fullmatch(name) or _address(name.strip("[]")):
        return name
    raise ValueError(f"expected a host name such as app.example.com or an address, without port; got {name!r}")


def _frame(origin: str) -> str:
    if _FRAME.fullmatch(origin):
        return origin
    raise ValueError(f"expected an origin such as https://example.com, without a path; got {origin!r}")
