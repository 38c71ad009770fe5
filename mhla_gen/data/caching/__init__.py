"""Caches of latents and embedded captions: build one, check it, train on it."""
