"""Tasks on text with images or sound."""
