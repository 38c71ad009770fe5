"""Video files: what they hold, and exact frames of them, with a time limit for each call."""

from mhla_gen.decoding.decoder import Decoder
from mhla_gen.decoding.frames import ClipFacts, Crop

__all__ = ["ClipFacts", "Crop", "Decoder"]
