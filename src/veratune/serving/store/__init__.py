"""Adapters on disk or in a bucket, with versions."""
