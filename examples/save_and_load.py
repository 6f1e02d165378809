"""Save learned attention to one file and load it into another pipeline.

python examples/save_and_load.py --out my-attention
"""

import argparse

import torch
from diffusers import DiffusionPipeline

import dit_accel
from dit_accel.common.bundled import IMAGE

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--out", default="my-attention", help="folder of the file")
args = parser.parse_args()

pipe = DiffusionPipeline.from_pretrained(IMAGE.folder)
before = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}

# Learned attention that is in the repository: SLA's projections, and LoRA on the blocks.
print(dit_accel.load_attention(pipe, IMAGE.conversions / "sla"))

# The file has the parameters, and the options of each layer in its metadata.
file = dit_accel.save_attention(pipe, args.out, dtype=torch.bfloat16)
print(f"{file}: {file.stat().st_size / 2**20:.2f} MiB")

other = DiffusionPipeline.from_pretrained(IMAGE.folder)
print(dit_accel.load_attention(other, args.out))

# Removal restores all weights.
dit_accel.reset_attn_processor(other)
after = other.transformer.state_dict()
print("restored bit for bit:", all(torch.equal(before[name], after[name]) for name in before))
