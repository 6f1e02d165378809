"""``python -m dit_accel.bench``."""

from .command import main

main()
