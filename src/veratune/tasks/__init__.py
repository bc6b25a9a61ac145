"""Tasks: from rows of data to batches, a loss and scores."""
