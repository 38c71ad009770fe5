"""HDR video to SDR, by one stated rule.

Diffuse white (203 cd/m² of PQ, 75 % of HLG's signal) becomes white; what is brighter, or outside of
the colours of BT.709, is cut.

Source:
    ITU-R BT.2100-2 (transfer functions), BT.2408-7 (diffuse white), BT.2087-0 (colours).
"""

from functools import cache

import numpy as np

_TO_BT709 = np.array(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]],
    np.float32,
)


def to_sdr(frame: np.ndarray, transfer: str) -> np.ndarray:
    """uint16 `[height, width, 3]` of BT.2020 to uint8 sRGB.

    Args:
        frame: The signal, 65535 for 1.
        transfer: PQ or HLG.
    """
    linear = np.clip(_light(transfer)[frame] @ _TO_BT709.T, 0, 1)
    signal = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return (signal * 255).round().astype(np.uint8)


@cache
def _light(transfer: str) -> np.ndarray:
    """Light of every signal, with diffuse white as 1, float32 `[65536]`."""
    signal = np.arange(65536) / 65535
    light = {"PQ": _pq, "HLG": _hlg}[transfer](signal)
    return light.astype(np.float32)


def _pq(signal: np.ndarray) -> np.ndarray:
    m1, m2, c1, c2, c3 = 1305 / 8192, 2523 / 32, 107 / 128, 2413 / 128, 2392 / 128
    power = signal ** (1 / m2)
    return (np.maximum(power - c1, 0) / (c2 - c3 * power)) ** (1 / m1) * 10000 / 203


def _hlg(signal: np.ndarray) -> np.ndarray:
    a, b, c = 0.17883277, 0.28466892, 0.55991073

    def scene(s: np.ndarray) -> np.ndarray:
        return np.where(s <= 0.5, s**2 / 3, (np.exp((s - c) / a) + b) / 12)

    return scene(signal) / scene(np.array(0.75))
