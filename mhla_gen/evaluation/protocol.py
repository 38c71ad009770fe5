"""Protocols: all that must be equal for two sets of features to be comparable."""

import json
from dataclasses import asdict, dataclass

from mhla_gen.evaluation.errors import EvaluationError, ProtocolMismatchError
from mhla_gen.evaluation.extractor import ExtractorIdentity

_REMEDIES = {
    "extractor": "rebuild the reference with this extractor, or choose the one it was built with",
    "weights": "use the same weights for both, or rebuild the reference",
    "resize": "rebuild the reference with this extractor",
    "dtype": "set features.dtype as the reference has it, or rebuild the reference",
    "image size": "bring both to one size with size=N, or rebuild the reference with that size",
    "frames": "set features.video_frames and video_stride as the reference has them",
}


@dataclass(frozen=True)
class EvaluationProtocol:
    """How one set was measured."""

    extractor: ExtractorIdentity
    frame_shape: tuple[int, int] | None
    """(height, width) of the images as the extractor got them; None if a file does not say."""
    crop: str = ""
    """How images came to that size, such as adm-crop-256; empty if they had it."""
    frames: str = ""
    """Frame rule of videos; empty for images."""

    def __str__(self) -> str:
        size = "x".join(map(str, self.frame_shape)) if self.frame_shape else "size-unknown"
        return " ".join(
            part for part in (str(self.extractor), size, self.crop, self.frames) if part
        )

    def require_same(self, other: "EvaluationProtocol") -> None:
        """Refuse to compare samples (this) with a reference (other) that was measured differently.

        How images were cropped to their size may differ: samples are made at it.

        Raises:
            ProtocolMismatchError: Naming each difference and what to do about the first.
        """
        ours, theirs = self._compared(), other._compared()
        differences = [
            key
            for key in ours
            if ours[key] != theirs[key]
            and not (key == "image size" and None in (ours[key], theirs[key]))
        ]
        if differences:
            found = "; ".join(
                f"{key}: samples {ours[key]}, reference {theirs[key]}" for key in differences
            )
            raise ProtocolMismatchError(
                f"samples and reference cannot be compared ({found}); {_REMEDIES[differences[0]]}"
            )

    def _compared(self) -> dict[str, str | None]:
        size = " × ".join(map(str, self.frame_shape)) if self.frame_shape else None
        return {
            "extractor": self.extractor.name,
            "weights": self.extractor.weights[:8],
            "resize": self.extractor.resize,
            "dtype": self.extractor.dtype,
            "image size": size,
            "frames": self.frames,
        }

    def to_json(self) -> str:
        """Text that `from_json` reads back."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "EvaluationProtocol":
        """Read what `to_json` wrote.

        Raises:
            EvaluationError: If it is something else.
        """
        try:
            values = json.loads(text)
            values["extractor"] = ExtractorIdentity(**values["extractor"])
            shape = values["frame_shape"]
            values["frame_shape"] = None if shape is None else tuple(shape)
            return cls(**values)
        except (ValueError, TypeError, KeyError) as error:
            raise EvaluationError(
                "the file's protocol cannot be read; rebuild it with `mhla-gen reference`"
            ) from error


def short_count(count: int | None) -> str:
    """50000 → 50k, 7562 → 7562, None → unknown."""
    if count is None:
        return "unknown"
    return f"{count // 1000}k" if count and count % 1000 == 0 else str(count)
