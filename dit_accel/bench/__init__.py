"""``dit-accel bench``: attention calls and whole denoiser steps, timed against dense attention in the same run."""
