"""Evaluation: images → features → statistics → numbers."""
