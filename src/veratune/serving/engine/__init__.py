"""Scheduling and running of requests."""
