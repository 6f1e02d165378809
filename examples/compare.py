"""Draw one prompt with dense attention and with several mechanisms, and print the differences.

`dit-accel compare` does this with timing, metrics and a picture of all; this is the loop in Python.

python examples/compare.py
"""

import argparse

import numpy as np
import torch
from diffusers import DiffusionPipeline

import dit_accel
from dit_accel import CLEARAttnProcessor, GNAAttnProcessor, LLSAAttnProcessor, SLAAttnProcessor
from dit_accel.common.bundled import IMAGE, read_defaults

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--size", type=int, default=512, help="height and width in pixels")
parser.add_argument("--steps", type=int, default=10)
args = parser.parse_args()

pipe = DiffusionPipeline.from_pretrained(IMAGE.folder)
pipe.set_progress_bar_config(disable=True)


def draw():
    generator = torch.Generator().manual_seed(0)
    settings = {**read_defaults(str(IMAGE.folder)), "num_inference_steps": args.steps, "output_type": "np"}
    settings |= {"height": args.size, "width": args.size}
    return pipe(IMAGE.prompts[0], generator=generator, **settings).images[0]


dense = draw()
for processor in (SLAAttnProcessor(critical=0.2, block_q=16, block_kv=16, tile_order=True), LLSAAttnProcessor(),
                  CLEARAttnProcessor(radius=12), GNAAttnProcessor(window=20, stride=4)):  # fmt: skip
    with dit_accel.attention(pipe, processor):
        error = np.square(draw() - dense).mean()
        print(f"{processor}: {dit_accel.logit_fraction(pipe):.1%} of the logits, PSNR {-10 * np.log10(error):.1f} dB")
