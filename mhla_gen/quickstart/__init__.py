"""The whole job in minutes: train on real digits, sample, score, beside a fair control."""

from mhla_gen.quickstart.quickstart import quickstart

__all__ = ["quickstart"]
