"""Adapters in memory, in stacked slots."""
