"""Image and video files: read exactly, decoded within a time limit, written."""

from mhla_gen.media.decoder import Decoder
from mhla_gen.media.frames import ClipFacts, Crop

__all__ = ["ClipFacts", "Crop", "Decoder"]
