"""``dit-accel bench``: time attention calls, denoiser and training steps against dense attention in the same run."""
