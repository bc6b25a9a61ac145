"""The mathematics on tensors."""
