"""The ``dit-accel`` command."""
