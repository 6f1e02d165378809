"""Training samples: files, captions, sizes and latents."""
