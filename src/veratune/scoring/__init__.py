"""Scores of generated text: against references, and by a judge."""
