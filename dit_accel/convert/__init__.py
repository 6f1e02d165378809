"""Fine-tuning that converts a pretrained pipeline to a mechanism: ``dit-accel convert``."""
