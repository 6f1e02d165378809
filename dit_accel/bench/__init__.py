"""``dit-accel bench``: attention calls, denoiser and training steps, timed against dense attention in the same run."""
