r"""Make the images of docs/evidence.md: 7,562 emoji of 64 pixels in 18 classes.

    npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0
    for f in emoji-datasource-*.tgz; do mkdir "${f%.tgz}" && tar -xzf "$f" -C "${f%.tgz}"; done
    python experiments/evidence/emoji_dataset.py emoji64.npz \
        noto=emoji-datasource-google-16.0.0/package \
        twemoji=emoji-datasource-twitter-16.0.0/package

Each package is one drawing style: Noto Emoji (Apache-2.0) and Twemoji (CC-BY 4.0). A class is a
category of emoji in one style; skin tones are included, the category "Component" is left out.
Transparent images are composited onto white and shuffled with a fixed seed.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from mhla_gen.files import written_whole

_LEFT_OUT = "Component"


def entries(package: Path) -> Iterator[tuple[str, Path]]:
    """Category and file of every image that a package draws.

    Args:
        package: The folder with emoji.json and img/STYLE/64.

    Raises:
        FileNotFoundError: If it is no such folder.
    """
    styles = sorted(folder.parent.name for folder in (package / "img").glob("*/64"))
    if not (package / "emoji.json").is_file() or len(styles) != 1:
        raise FileNotFoundError(
            f"{package} must hold emoji.json and img/STYLE/64; give the folder `package` of an "
            "unpacked emoji-datasource package"
        )
    style = styles[0]
    for emoji in json.loads((package / "emoji.json").read_bytes()):
        if emoji["category"] == _LEFT_OUT:
            continue
        for drawn in (emoji, *emoji.get("skin_variations", {}).values()):
            if drawn[f"has_img_{style}"]:
                yield emoji["category"], package / "img" / style / "64" / drawn["image"]


def on_white(path: Path) -> np.ndarray:
    """An image as uint8 `[height, width, 3]`, transparency filled with white."""
    with Image.open(path) as image:
        image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return np.asarray(Image.alpha_composite(white, image).convert("RGB"))


def make(packages: dict[str, Path]) -> dict[str, np.ndarray]:
    """All images with their classes, shuffled.

    Args:
        packages: Name of the style → folder of its package.

    Returns:
        `arr_0` uint8 `[images, 64, 64, 3]`, `labels` int64, `classes`: their names.
    """
    found = [
        (f"{category}/{style}", file)
        for style, package in packages.items()
        for category, file in entries(package)
    ]
    classes = sorted({name for name, _ in found})
    order = np.random.default_rng(0).permutation(len(found))
    return {
        "arr_0": np.stack([on_white(found[i][1]) for i in order]),
        "labels": np.array([classes.index(found[i][0]) for i in order], dtype=np.int64),
        "classes": np.array(classes),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the file."""
    summary = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("out", type=Path)
    parser.add_argument("packages", nargs="+", metavar="STYLE=FOLDER")
    options = parser.parse_args(arguments)
    packages = {}
    for item in options.packages:
        style, given, folder = item.partition("=")
        if not given:
            parser.error(f"packages are written STYLE=FOLDER, found {item!r}")
        packages[style] = Path(folder)
    arrays = make(packages)
    with written_whole(options.out) as partial, partial.open("wb") as file:
        np.savez_compressed(
            file, arr_0=arrays["arr_0"], labels=arrays["labels"], classes=arrays["classes"]
        )
    print(f"wrote {len(arrays['labels'])} images of {len(arrays['classes'])} classes")


if __name__ == "__main__":
    main()
