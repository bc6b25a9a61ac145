"""Measures and plots, of adapters and of models without weights."""
