"""What chat, eval, merge, sample and serve share."""
