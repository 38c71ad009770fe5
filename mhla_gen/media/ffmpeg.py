"""The ffmpeg program: the content of a video file, and the frames that a player would show.

decord seeks by assumptions that do not hold for some files, and silently returns wrong frames: for
transport and program streams, AVI with B-frames, open groups of pictures (x265's default), and
files whose edit list hides their beginning. The ffmpeg program handles all of these, and rotations
and flips, as players do.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from mhla_gen.media.pictures import UnreadableImageError

# Containers whose index and time stamps can be relied on.
_INDEXED = ("mov,mp4,", "matroska,")
_KEY, _DISCARD = 1, 4
_ALPHA = re.compile(r", (yuva|gbrap|rgba|bgra|argb|abgr|ya8|ya16|pal8)")
# Names of transfer functions, matrices and primaries, the telling ones first.
_HDR = {"smpte2084": "PQ", "arib-std-b67": "HLG", "bt2020": "BT.2020"}
# Their ordinary decoders drop the second picture that holds the transparency.
_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}


_PIXELS = {"rgb24": (3, "u1"), "rgba": (4, "u1"), "rgb48le": (3, "<u2")}
_COMPLAINT = re.compile(r"^.*\[(?:error|fatal)\] (.*)$", re.MULTILINE)
# Errors end the program, lest it show a frame that it had to patch up.
_STRICT = ("-xerror",)


class Probe(NamedTuple):
    """What FFmpeg finds in a file without decoding it."""

    times: np.ndarray
    """When packets that are shown are shown, in seconds, ascending, float64 `[packets]`."""
    height: int
    """In stored pixels, as players turn it."""
    width: int
    square_height: int
    """In square pixels, as players turn it."""
    square_width: int
    hdr: str
    """PQ, HLG or, where the file does not say which, BT.2020; empty for ordinary video."""
    turned: bool
    """Whether there is a rotation or a flip to apply."""
    alpha: bool
    """Whether it can be transparent."""
    decoder: str
    """Which one must be asked for; empty for the ordinary one."""
    exact: bool
    """Whether each packet is a frame at its time, and FFmpeg finds it from there."""
    closed: bool
    """Whether no picture needs another from before its key frame, and none is hidden."""


def executable() -> str:
    """The path of FFmpeg's program.

    Raises:
        RuntimeError: If there is none.
    """
    import imageio_ffmpeg

    return imageio_ffmpeg.get_ffmpeg_exe()


def probe(path: str | Path) -> Probe:
    """Read headers and the list of packets.

    Raises:
        UnreadableImageError: If FFmpeg cannot read it, or there is no video in it.
    """
    result = subprocess.run(
        [
            *_input(path, level="level+info"),
            *("-map", "0:V:0", "-c", "copy", "-copyinkf", "-f", "framecrc", "-"),
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )
    said = result.stderr.decode(errors="replace")
    packets = _Packets.parse(result.stdout.decode())
    if result.returncode or not packets.rows:
        raise _unreadable(said)
    # After "Output" FFmpeg repeats the one stream that was chosen.
    source, _, stream = said.partition("Output #")
    video = next((line for line in stream.splitlines() if " Video: " in line), "")
    rotation = re.search(r"isplay ?[Mm]atrix: rotation of (\S+) degrees", stream)
    stored = packets.height, packets.width
    square = packets.height, max(1, round(packets.width * packets.aspect))
    if rotation and abs(float(rotation[1])) in (90, 270):
        stored, square = stored[::-1], square[::-1]
    coded = re.search(r"alpha_mode\s*: 1", stream)
    codec = re.search(r" Video: (\w+)", video)
    indexed = any(f"Input #0, {name}" in source for name in _INDEXED)
    return Probe(
        times=packets.times,
        height=stored[0],
        width=stored[1],
        square_height=square[0],
        square_width=square[1],
        hdr=next((name for tag, name in _HDR.items() if tag in video), ""),
        turned=rotation is not None,
        alpha=bool(coded or _ALPHA.search(video)),
        decoder=_ALPHA_DECODERS.get(codec[1], "") if coded and codec else "",
        exact=indexed and packets.exact and not _COMPLAINT.search(said),
        closed=packets.closed,
    )


def decoded_times(path: str | Path) -> np.ndarray:
    """When each frame is shown, in seconds, float64 `[frames]`, by decoding all of them.

    Raises:
        UnreadableImageError: If FFmpeg cannot decode it, or there are no frames.
    """
    result = subprocess.run(
        [
            *_input(path, *_STRICT),
            "-map",
            "0:V:0",
            "-fps_mode",
            "passthrough",
            "-f",
            "framecrc",
            "-",
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )
    packets = _Packets.parse(result.stdout.decode())
    if result.returncode or not packets.rows:
        raise _unreadable(result.stderr.decode(errors="replace"))
    return packets.times


def shown_frames(
    path: str | Path, found: Probe, indices: Sequence[int], pixels: str = "rgb24"
) -> Iterator[tuple[int, np.ndarray]]:
    """Decode frames as they are shown, except for the shape of pixels.

    Args:
        path: Video file.
        found: What `probe` said of it.
        indices: Frame numbers, ascending, each once.
        pixels: rgb24, rgba or rgb48le.

    Yields:
        A number, and its frame: uint8 or uint16 `[height, width, channels]`.

    Raises:
        UnreadableImageError: If FFmpeg cannot decode one of them.
    """
    first, last, seek = indices[0], indices[-1], []
    if found.exact and first > 0:
        # In front of the first frame wanted, and after the one before it.
        start = float(found.times[first - 1] + found.times[first]) / 2
        seek, last, first = ["-ss", f"{start:.6f}"], last - first, 0
    offset = indices[0] - first
    channels, dtype = _PIXELS[pixels]
    command = [
        *_input(path, *_STRICT, *seek, decoder=found.decoder),
        *("-map", "0:V:0", "-fps_mode", "passthrough", "-frames:v", str(last + 1)),
        *("-f", "rawvideo", "-pix_fmt", pixels, "-"),
    ]
    size = found.height * found.width * channels * np.dtype(dtype).itemsize
    with (
        tempfile.TemporaryFile() as complaints,
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=complaints
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for number in range(offset, offset + last + 1):
                content = _exactly(process.stdout, size)
                if len(content) < size:
                    process.wait()
                    complaints.seek(0)
                    said = complaints.read().decode(errors="replace")
                    raise _unreadable(said, f"frame {number} is missing")
                if number in indices:
                    shape = (found.height, found.width, channels)
                    yield number, np.frombuffer(content, dtype).reshape(shape)
        finally:
            process.kill()


def _input(
    path: str | Path, *options: str, decoder: str = "", level: str = "level+error"
) -> list[str]:
    # As an address, the name of a file may have colons and signs; a list of segments inside of it
    # may not lead elsewhere.
    return [
        *(executable(), "-nostdin", "-hide_banner", "-loglevel", level, "-nostats"),
        *("-protocol_whitelist", "file", "-threads", "1", *options),
        *(("-c:v", decoder) if decoder else ()),
        *("-i", f"file:{os.path.abspath(path)}"),
    ]


def _exactly(stream: IO[bytes], size: int) -> bytes:
    parts = []
    while size and (part := stream.read(size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _unreadable(said: str, otherwise: str = "no frames") -> UnreadableImageError:
    """The first complaint in what FFmpeg said, without its places."""
    found = _COMPLAINT.search(said)
    return UnreadableImageError(f"cannot be decoded ({found[1].strip() if found else otherwise})")


class _Packets(NamedTuple):
    """What FFmpeg's framecrc format lists."""

    rows: list[tuple[int | None, int]]
    """Time in ticks and flags of each packet, in the order in which they are decoded."""
    tick: Fraction
    height: int
    width: int
    aspect: Fraction

    @classmethod
    def parse(cls, text: str) -> "_Packets":
        facts, rows = {}, []
        for line in text.splitlines():
            if line.startswith("#"):
                name, _, value = line.partition(": ")
                facts[name] = value.strip()
            elif line.strip():
                _, _, time, _, _, _, *more = (field.strip() for field in line.split(","))
                flags = [int(field[2:], 16) for field in more if field.startswith("F=")]
                known = time.lstrip("-").isdigit()
                rows.append((int(time) if known else None, flags[0] if flags else _KEY))
        width, height = map(int, facts.get("#dimensions 0", "0x0").split("x"))
        # 0/1 stands for unknown.
        aspect = Fraction(facts.get("#sar 0", "0/1")) or Fraction(1)
        return cls(rows, Fraction(facts.get("#tb 0", "1/1")), height, width, aspect)

    @property
    def _shown(self) -> list[int]:
        return sorted(t for t, flags in self.rows if t is not None and not flags & _DISCARD)

    @property
    def times(self) -> np.ndarray:
        return np.array([float(time * self.tick) for time in self._shown])

    @property
    def exact(self) -> bool:
        """Whether all have times, all different, and none needs what was cut away before it."""
        times = [time for time, _ in self.rows]
        first, flags = self.rows[0]
        if first is None or None in times or not flags & _KEY:
            return False
        return len(set(times)) == len(times) and min(t for t in times if t is not None) == first

    @property
    def closed(self) -> bool:
        """Whether none is hidden, and none is shown before the key frame that it follows."""
        key = None
        for time, flags in self.rows:
            key = time if flags & _KEY else key
            if flags & _DISCARD or time is None or key is None or time < key:
                return False
        return True
