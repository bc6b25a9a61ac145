"""The modules that take an adapted layer's place in a model."""
