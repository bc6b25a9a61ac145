"""Accuracy per byte: one protocol for VeRA and the methods beside it."""
