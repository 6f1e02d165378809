"""``accelerate launch -m dit_accel.convert …``: the same as ``dit-accel convert …``, on many GPUs."""

import sys

from ..cli import main

main(["convert", *sys.argv[1:]])
