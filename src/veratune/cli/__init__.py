"""The `veratune` command."""
