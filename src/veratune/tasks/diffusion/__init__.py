"""Diffusion tasks."""
