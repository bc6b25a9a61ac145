"""Routes: what can be asked over HTTP."""
