"""The attention mechanisms, one paper a file."""
