"""Give layers different options, and leave layers and the first steps dense.

python examples/choose_layers.py
"""

import argparse

import torch
from diffusers import DiffusionPipeline

import dit_accel
from dit_accel import GNAAttnProcessor
from dit_accel.common.bundled import IMAGE, read_defaults

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--size", type=int, default=512, help="height and width in pixels")
parser.add_argument("--steps", type=int, default=10)
parser.add_argument("--out", default="picture.png")
args = parser.parse_args()

pipe = DiffusionPipeline.from_pretrained(IMAGE.folder)

# A regular expression searched in the names of layers. Double blocks stay dense: no call names them.
narrow = GNAAttnProcessor(window=16, stride=4, dense_steps=2)
dit_accel.set_attn_processor(pipe, narrow, layers=r"single_transformer_blocks")

# A later call replaces the processor of the layers that it names.
wide = GNAAttnProcessor(window=40, stride=8, dense_steps=2)
dit_accel.set_attn_processor(pipe, wide, layers=["single_transformer_blocks.0.attn"])

generator = torch.Generator().manual_seed(0)
settings = {**read_defaults(str(IMAGE.folder)), "num_inference_steps": args.steps}
settings |= {"height": args.size, "width": args.size}
pipe(IMAGE.prompts[0], generator=generator, **settings).images[0].save(args.out)
print(dit_accel.describe(pipe))

dit_accel.reset_attn_processor(pipe)
print(dit_accel.describe(pipe))
