"""Adapter <-> file, and nothing else."""
