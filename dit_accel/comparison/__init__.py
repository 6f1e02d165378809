"""``dit-accel compare``: the same prompts with dense attention and each mechanism, with times and image quality."""
