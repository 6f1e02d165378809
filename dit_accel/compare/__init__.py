"""``dit-accel compare``: the same prompts with dense attention and with each mechanism, and what each cost."""
