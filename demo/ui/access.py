"""Host names, origins and framing pages that the app accepts.

A page of another site can point its own host name at this machine (DNS rebinding) and can send requests to it. Only
the ``Host`` and ``Origin`` headers distinguish these requests from the app's own. An IP address in ``Host`` cannot be
rebound.
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

    Accepted hosts: localhost, 127.0.0.1, [::1], ``host``, ``names`` and, if ``host`` is 0.0.0.0 or ::, every IP
    address. In a Hugging Face Space, the Space's own names are accepted too, and the Hub may show the page in a frame.

    Args:
        host: address or name that the server listens on.
        names: further names or addresses under which the page is reached.
        frames: origins of pages that may show the app in a frame, such as ``https://example.com``.
    Raises: ValueError: an invalid host name or origin.
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
        """Accept the host of a URL."""
        self._given.add(_plain(urlsplit(url).hostname or ""))

    def refusal(self, host: str, origin: str | None) -> tuple[int, str] | None:
        """HTTP status and reason for refusing a request with these headers; None to accept it."""
        found = _HOST.fullmatch(host)
        if found is None:
            return 400, "The request's Host header is malformed."
        name = _plain(found[1])
        if not (name in self._own | self._given or (self._every_address and _address(name))):
            reason = f"This page is not served under the name {name}."
            return 421, f"{reason} To accept this name, start the app with --allow-host {name}"
        if origin is None or self._is_own(origin, host):
            return None
        return 403, (
            "Requests from pages of other sites are refused. If a proxy serves this page under another name, start the "
            "app with --allow-host NAME"
        )

    def _is_own(self, origin: str, host: str) -> bool:
        scheme, _, netloc = origin.partition("://")
        found = _HOST.fullmatch(netloc)
        if scheme not in ("http", "https") or found is None:
            return False
        return netloc.lower() == host.lower() or _plain(found[1]) in self._given

    @property
    def headers(self) -> list[tuple[str, str]]:
        """Headers of each response."""
        policy = " ".join(["frame-ancestors", "'self'", *self._frames])
        headers = [
            ("Content-Security-Policy", policy),
            ("X-Content-Type-Options", "nosniff"),
            ("Referrer-Policy", "same-origin"),
        ]
        if not self._frames:  # X-Frame-Options cannot name another site
            headers.append(("X-Frame-Options", "SAMEORIGIN"))
        return headers


def _address(name: str) -> str | None:
    """IP address in its shortest spelling; None if the name is not an IP address."""
    try:
        return str(ip_address(name))
    except ValueError:
        return None


def _plain(name: str) -> str:
    """Canonical spelling of a name or address."""
    name = name.lower().strip("[]").removesuffix(".")
    return _address(name) or name


def _name(name: str) -> str:
    if _NAME.fullmatch(name) or _address(name.strip("[]")):
        return name
    raise ValueError(f"expected a host name such as app.example.com, or an address, without a port; got {name!r}")


def _frame(origin: str) -> str:
    if _FRAME.fullmatch(origin):
        return origin
    raise ValueError(f"expected an origin such as https://example.com, without a path; got {origin!r}")
