"""Fine-tuning of a pretrained pipeline with a sub-quadratic attention mechanism: ``dit-accel convert``."""
