"""Checkpoints of other code and ours, both ways: one module per format, and `convert`.

A format is two pure functions on state dicts: `read` says which model of ours the weights are and
what its weights are; `write` is the inverse. A checkpoint that would compute another function here
is refused.
"""

from mhla_gen.conversion.conversion import convert
from mhla_gen.conversion.reading import read_checkpoint

__all__ = ["convert", "read_checkpoint"]
