"""Pipelines of our own: what training saves, and sampling draws from."""
