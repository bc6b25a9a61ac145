"""Feedback on completions, from which tenants' adapters are trained."""
