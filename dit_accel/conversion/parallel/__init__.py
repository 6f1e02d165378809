"""Training in several processes: plain, with FSDP2 and with DeepSpeed, behind one protocol."""
