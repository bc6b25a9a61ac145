"""Many adapters trained in the same batches."""
