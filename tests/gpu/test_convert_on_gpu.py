"""Conversions on a GPU: captured steps equal eager steps."""

import json

import pytest
from rich.console import Console

from dit_accel.common.bundled import IMAGE, VIDEO
from dit_accel.conversion.request import Request, Source
from dit_accel.conversion.run import run
from dit_accel.mechanisms.attn_spec import parse_attention

SPECS = {
    "image": "sla:critical=0.1,block_q=8,block_kv=8",
    "video": "llsa:block_size=8,topk=8,levels=2;topk=16@blocks.0",
}


def losses(kind, out, cuda_graph):
    embedded = VIDEO if kind == "video" else IMAGE
    out.mkdir()
    height, width, frames = (64, 64, 9) if kind == "video" else (128, 128, None)
    source = Source(
        pipeline=str(embedded.folder), prompts=embedded.prompts, samples=4, height=height, width=width, frames=frames,
        out=out,
    )  # fmt: skip
    request = Request(
        source=source, attention=parse_attention(SPECS[kind]), recipe="clear", train="lora", rank=4, steps=12, batch=2,
        accumulate=2, lr=3e-3, warmup=2, mixed_precision="bf16", save_every=100, lora_layers="blocks",
        cuda_graph=cuda_graph,
    )  # fmt: skip
    run(request, Console(quiet=True))
    return [row["loss"] for row in json.loads((out / "convert.json").read_text())["history"]]


@pytest.mark.parametrize("kind", SPECS)
def test_captured_steps_equal_eager_steps(tmp_path, kind):
    """Twelve steps of two batches each, in bfloat16; the first runs the same kernels on the same numbers."""
    eager, captured = (losses(kind, tmp_path / str(graph), graph) for graph in (False, True))
    assert captured[0] == pytest.approx(eager[0], rel=1e-5)
    assert captured == pytest.approx(eager, rel=0.02)
    assert captured[-1] < captured[0]
