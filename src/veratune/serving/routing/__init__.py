"""Routing: which adapter a prompt is for (model="auto")."""
