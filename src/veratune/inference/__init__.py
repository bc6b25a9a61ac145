"""Loading, generation and evaluation, shared by chat, eval, merge, sample and serve."""
