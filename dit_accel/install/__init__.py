"""Installation of processors on the attention layers of diffusers models, and its exact removal."""
