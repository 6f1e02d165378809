"""Draw a picture with a mechanism: one line sets it.

python examples/generate.py --out picture.png
"""

import argparse

import torch
from diffusers import DiffusionPipeline

import dit_accel
from dit_accel.common.bundled import IMAGE, read_defaults

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--pipeline", default=IMAGE.folder, help="a folder or hub id; default the embedded image pipeline")
parser.add_argument("--prompt", default=IMAGE.prompts[0])
parser.add_argument("--size", type=int, default=512, help="height and width in pixels")
parser.add_argument("--steps", type=int, default=10)
parser.add_argument("--out", default="picture.png")
args = parser.parse_args()

cuda = torch.cuda.is_available()
pipe = DiffusionPipeline.from_pretrained(args.pipeline, dtype=torch.bfloat16 if cuda else torch.float32)
pipe.to("cuda" if cuda else "cpu")

pipe.set_attn_processor(dit_accel.SLAAttnProcessor(critical=0.3, block_q=16, block_kv=16, tile_order=True))

size = {"height": args.size, "width": args.size, "num_inference_steps": args.steps}
settings = {**read_defaults(str(args.pipeline)), **size}  # of the embedded pipelines: a short caption
pipe(args.prompt, generator=torch.Generator().manual_seed(0), **settings).images[0].save(args.out)

print(dit_accel.describe(pipe))
print(f"{dit_accel.logit_fraction(pipe):.1%} of the logits; the picture is {args.out}")
