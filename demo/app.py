"""Demo app with one tab per view. Start it with ``dit-accel demo``."""

from __future__ import annotations

import os
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio as gr
from gradio import processing_utils

from dit_accel.demo.ui import compare_tab, convert_tab, look_tab, speed_tab
from dit_accel.demo.ui.access import Access
from dit_accel.demo.ui.engine import Engine
from dit_accel.demo.ui.server import guarded_server

__all__ = ["build_app", "launch"]

_TABS = {"Compare": compare_tab, "Look inside": look_tab, "Speed": speed_tab, "Convert": convert_tab}
_TITLE = "dit_accel: sub-quadratic attention"
_INTRODUCTION = (
    "# Diffusion with less attention\n"
    "In a diffusion transformer, each token attends to all tokens: twice the width and height cost sixteen times as "
    "much. This page compares dense attention with sub-quadratic attention for the same prompt and seed."
)
_MAX_QUEUED = 20
_CSS = """
.gradio-container { max-width: 1280px !important; margin: 0 auto !important }
.gradio-container .problem { color: var(--error-text-color, #b91c1c); font-weight: 600 }
.gradio-container progress { appearance: none; width: 100%; height: 0.6rem; margin-top: 0.5rem; border: 0 }
progress, progress::-webkit-progress-bar { background: var(--border-color-primary); border-radius: 9px }
.gradio-container progress::-webkit-progress-value { background: var(--color-accent); border-radius: 9px }
.gradio-container progress::-moz-progress-bar { background: var(--color-accent); border-radius: 9px }
"""
_SYSTEM_FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
_SYSTEM_MONOSPACE = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")


def build_app(engine: Engine) -> gr.Blocks:
    """Build the page."""
    with gr.Blocks(title=_TITLE, analytics_enabled=False, delete_cache=(600, 3600)) as app:
        gr.Markdown(_INTRODUCTION)
        for name, tab in _TABS.items():
            with gr.Tab(name):
                tab.build(engine)
    return app


def launch(engine: Engine, access: Access | None = None, port: int | None = None, share: bool = False) -> Any:
    """Serve the page in background threads.

    Args:
        access: address to listen on, and accepted hosts and origins; default this machine only.
        port: None or 0 = the first free port from 7860 on.
    Returns: the running ``gr.Blocks``; ``close()`` stops it.
    """
    processing_utils.async_ssrf_protected_get = _refuse_download
    app = build_app(engine)
    app.queue(max_size=_MAX_QUEUED, api_open=False)  # otherwise run/predict bypasses the queue
    app.has_launched = True  # Gradio checks files in requests only once this is set, which it does after it listens
    access = access or Access()
    with guarded_server(access) as server:
        app.launch(
            server_name=f"[{access.host}]" if ":" in access.host else access.host, server_port=port or None,
            share=share, prevent_thread_lock=True, theme=_theme(), css=_CSS + compare_tab.CSS, head=compare_tab.HEAD,
            quiet=True, max_file_size=1, enable_monitoring=False, footer_links=["settings"], run_history=False,
            pwa=False, mcp_server=False, ssr_mode=False,
        )  # fmt: skip
    if not isinstance(app.server, server):
        app.close(verbose=False)
        raise RuntimeError("this version of Gradio does not start the guarded server: install gradio 6")
    if app.share_url:
        access.add(app.share_url)
    return app


async def _refuse_download(url: str) -> Any:
    """Replacement for Gradio's download of URLs in requests."""
    raise ValueError(f"downloads from other machines are disabled, got {url}")


def _theme() -> gr.Theme:
    """Theme with system fonts, which need no download."""
    theme = gr.themes.Soft(font=_SYSTEM_FONTS, font_mono=_SYSTEM_MONOSPACE)
    plain = {"background_fill": "none", "padding": "0", "text_weight": "600"}
    return theme.set(
        **{f"block_title_{name}": value for name, value in plain.items()},
        button_primary_background_fill="*primary_600", button_primary_background_fill_hover="*primary_700",
    )  # fmt: skip
