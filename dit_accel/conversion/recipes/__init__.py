"""Recipes: stages, losses, noise levels and what is trained."""
