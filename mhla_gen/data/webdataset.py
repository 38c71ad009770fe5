"""Images in WebDataset shards: tar files, read at random by an index over their members."""

import json
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from mhla_gen.data.stores import known_of
from mhla_gen.media.pictures import IMAGE_SUFFIXES

_TEXTS = (".cls", ".txt", ".json")


class Member(NamedTuple):
    """Where an image lies in a shard."""

    shard: Path
    key: str
    start: int
    size: int


@dataclass(frozen=True, eq=False)
class TarStore:
    """Images of shards, in the order of shards and members; see `ImageStore`."""

    members: tuple[Member, ...]
    labels: np.ndarray | None
    class_names: tuple[str, ...] | None
    captions: tuple[str, ...] | None

    def __len__(self) -> int:
        return len(self.members)

    def describe(self, index: int) -> str:
        """See `ImageStore`."""
        return f"{self.members[index].shard}: {self.members[index].key}"

    def content(self, index: int) -> bytes:
        """See `ImageStore`."""
        member = self.members[index]
        with member.shard.open("rb") as file:
            file.seek(member.start)
            return file.read(member.size)


def tar_shards(
    pattern: str, label_column: str, caption_column: str, num_classes: int | None
) -> TarStore:
    """Index shards whose samples are `key.jpg` with `key.cls`, `key.txt` or `key.json`.

    Args:
        pattern: A shard, a folder of shards, or a pattern such as shards/train-*.tar.
        label_column: Key of the label in a json member; `.cls` goes before it.
        caption_column: Key of the caption in a json member; `.txt` goes before it.
        num_classes: See `number_classes`.

    Raises:
        FileNotFoundError: If there are no shards.
        ValueError: If a shard is no plain tar file, or labels and captions do not fit.
    """
    members: list[Member] = []
    rows: list[dict[str, Any]] = []
    for shard in _shards(pattern):
        for member, texts in _samples(shard):
            members.append(member)
            rows.append(_row(member, texts, label_column, caption_column))
    if not members:
        raise ValueError(f"data.path {pattern} has no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    known = known_of(str(pattern), rows, label_column, caption_column, num_classes)
    return TarStore(tuple(members), *known)


def _shards(pattern: str) -> list[Path]:
    path = Path(pattern)
    if path.is_dir():
        found = sorted(path.glob("*.tar"))
    elif path.is_file():
        found = [path]
    else:
        found = sorted(path.parent.glob(path.name))
    if not found:
        raise FileNotFoundError(f"data.path {pattern} names no tar files")
    return found


def _samples(shard: Path) -> list[tuple[Member, dict[str, str]]]:
    """Images of a shard, each with its text members by suffix."""
    images: dict[str, Member] = {}
    texts: dict[str, dict[str, str]] = {}
    try:
        # "r:" refuses compressed archives, whose members cannot be read at random.
        with tarfile.open(shard, "r:") as archive:
            for entry in archive:
                if not entry.isfile():
                    continue
                folder, name = PurePosixPath(entry.name).parent, PurePosixPath(entry.name).name
                # WebDataset: the key ends at the first dot of the name.
                stem, _, suffix = name.partition(".")
                key, suffix = str(folder / stem), f".{suffix.lower()}"
                if suffix in IMAGE_SUFFIXES:
                    images[key] = Member(shard, key, entry.offset_data, entry.size)
                elif suffix in _TEXTS:
                    content: Any = archive.extractfile(entry)
                    texts.setdefault(key, {})[suffix] = content.read().decode()
    except (tarfile.TarError, UnicodeDecodeError) as error:
        raise ValueError(f"{shard} is not a plain tar file of samples: {error}") from error
    return [(member, texts.get(key, {})) for key, member in images.items()]


def _row(
    member: Member, texts: dict[str, str], label_column: str, caption_column: str
) -> dict[str, Any]:
    try:
        values = json.loads(texts.get(".json", "{}"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{member.shard}: {member.key}.json is not JSON: {error}") from error
    row = {k: values[k] for k in (label_column, caption_column) if k in values}
    if ".cls" in texts:
        row[label_column] = texts[".cls"]
    if ".txt" in texts:
        row[caption_column] = texts[".txt"]
    return row
