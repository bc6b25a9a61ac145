"""Adapters as files: veratune's own, and those of other programs."""
