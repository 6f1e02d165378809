"""Attention mechanisms, one paper per file."""
