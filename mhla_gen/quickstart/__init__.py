"""The whole job in minutes: train on real digits, sample, evaluate, next to a fair control."""

from mhla_gen.quickstart.quickstart import quickstart

__all__ = ["quickstart"]
