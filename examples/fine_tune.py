"""Fine-tune a pipeline into a mechanism on a folder of pictures with captions.

Each picture has its caption in a .txt of the same name. Two commands make such a folder and train on it:

python -m dit_accel.demo.scenes.write_scenes image --out scenes --count 64
python examples/fine_tune.py scenes --out my-gna
"""

import argparse

from diffusers import DiffusionPipeline

import dit_accel
from dit_accel.common.bundled import IMAGE

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("data", help="folder of pictures with captions")
parser.add_argument("--size", type=int, default=512, help="height and width in pixels")
parser.add_argument("--steps", type=int, default=200, help="of the optimizer")
parser.add_argument("--out", default="my-gna")
args = parser.parse_args()

processor = dit_accel.GNAAttnProcessor(window=(20, 20), stride=(4, 4))
dit_accel.convert(  # the command `dit-accel convert`; an interrupted run is resumed by the same call
    processor, args.out, data=args.data, recipe="clear", train="lora", rank=8, lr=1e-3, report=0, steps=args.steps,
    height=args.size, width=args.size,
)  # fmt: skip

pipe = DiffusionPipeline.from_pretrained(IMAGE.folder)
print(dit_accel.load_attention(pipe, args.out))
