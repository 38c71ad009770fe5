"""Video files: what they hold, and exact frames of them, with a time limit for each call."""

from mhla_gen.decoding.decoder import Decoder, UnreadableClipError
from mhla_gen.decoding.frames import ClipFacts

__all__ = ["ClipFacts", "Decoder", "UnreadableClipError"]
