"""Output folders: whose they are, and one command in each at a time."""
