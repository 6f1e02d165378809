"""Run the app until a signal stops it. Gradio is imported after its temporary folder has been set."""

from __future__ import annotations

import os
import threading

import torch

from dit_accel.demo.ui.access import Access
from dit_accel.demo.ui.engine import Engine

__all__ = ["serve"]


def serve(
    pipeline: str | None, device: torch.device, dtype: torch.dtype, access: Access, port: int | None, share: bool
) -> None:
    """Load the pipeline, serve the app and print its address; remove the temporary folder on exit.

    Raises: BadInput: the pipeline cannot be loaded; OSError: the port is taken; KeyboardInterrupt: a signal.
    """
    with Engine(pipeline, device, dtype) as engine:
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        os.environ["GRADIO_TEMP_DIR"] = str(engine.folder / "page")
        from dit_accel.demo.app import launch

        app = launch(engine, access, port, share)
        try:
            print(f"The page is at {app.local_url}" + (f" and {app.share_url}" if share else ""), flush=True)
            print("Press Ctrl-C to stop.", flush=True)
            threading.Event().wait()
        finally:
            app.close(verbose=False)
