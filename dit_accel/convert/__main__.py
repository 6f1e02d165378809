"""Entry point for several GPUs: ``accelerate launch -m dit_accel.convert …`` is ``dit-accel convert …`` per process."""

import sys

from ..cli import main

main(["convert", *sys.argv[1:]])
