"""Training in several processes: FSDP2 and DeepSpeed."""
