"""``python -m dit_accel.cli``, and ``accelerate launch -m dit_accel.cli convert`` for several processes."""

from .app import main

if __name__ == "__main__":
    main()
