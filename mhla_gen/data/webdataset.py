"""Images in WebDataset shards: tar files, read at random by an index over their members.

Not `datasets`' reader, which copies all shards before it has a sample by its number, and silently
takes a shard that is cut or damaged in the middle for a shorter one.
"""

import posixpath
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from mhla_gen.data.lists import known_of
from mhla_gen.errors import MissingError, UserError
from mhla_gen.files.text import Row, decode_text, parse_object
from mhla_gen.media.folders import is_hidden
from mhla_gen.media.pictures import IMAGE_SUFFIXES

_TEXTS = (".cls", ".txt", ".json")
_LARGEST_TEXT = 2**24


class Member(NamedTuple):
    """The place of an image in a shard."""

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
            content = file.read(member.size)
        if len(content) < member.size:
            raise OSError("the shard has become shorter")
        return content


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
        MissingError: If there are no shards.
        UserError: If a shard is no whole, plain tar file, keys are equal, or labels or captions do
            not fit.
    """
    members: list[Member] = []
    rows: list[Row] = []
    for shard in _shards(pattern):
        for member, texts in _samples(shard):
            members.append(member)
            rows.append(_row(member, texts, label_column, caption_column))
    if not members:
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
        raise UserError(
            f"data.path {pattern} has no images ({suffixes}); the key of a sample ends at the "
            "first dot of the name, so v1.0.png is none"
        )
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
    found = [path for path in found if not is_hidden(path.name)]
    if not found:
        raise MissingError(f"data.path {pattern} matches no tar files")
    return found


def _samples(shard: Path) -> list[tuple[Member, dict[str, str]]]:
    """Images of a shard, each with its text members by suffix."""
    try:
        # "r:" refuses compressed archives, whose members cannot be read at random.
        with tarfile.open(shard, "r:") as archive:
            entries = list(archive)
            _check_end(shard, archive, len(entries))
            return _grouped(shard, archive, entries)
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{shard} is not a plain tar file of samples: {error}") from error


def _check_end(shard: Path, archive: tarfile.TarFile, entries: int) -> None:
    """Raise unless the archive ends with its end mark.

    tarfile takes a header that is cut or damaged for the end, and leaves out all that is behind it.
    """
    with shard.open("rb") as file:
        file.seek(archive.offset)
        block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise UserError(
            f"{shard} is truncated: there is no end mark after its {entries} members; copy or "
            "write it again"
        )
    if block.strip(b"\0"):
        raise UserError(f"{shard} is damaged after its first {entries} members; copy it again")


def _grouped(
    shard: Path, archive: tarfile.TarFile, entries: list[tarfile.TarInfo]
) -> list[tuple[Member, dict[str, str]]]:
    images: dict[str, tuple[str, Member]] = {}
    texts: dict[str, dict[str, str]] = {}
    known = {entry.name: entry for entry in entries if entry.isfile()}
    for entry in entries:
        name = PurePosixPath(entry.name).name
        # WebDataset: the key ends at the first dot of the name. Some systems add hidden files.
        stem, _, suffix = name.partition(".")
        suffix = f".{suffix.lower()}"
        hidden = any(map(is_hidden, PurePosixPath(entry.name).parts))
        if hidden or entry.isdir() or suffix not in (*IMAGE_SUFFIXES, *_TEXTS):
            continue
        key = str(PurePosixPath(entry.name).parent / stem)
        target = _target(shard, entry, known)
        if suffix in _TEXTS:
            of_key = texts.setdefault(key, {})
            if suffix in of_key:
                raise UserError(f"{shard} has two members {key}{suffix}")
            of_key[suffix] = _text(shard, archive, target)
        elif key in images:
            raise UserError(
                f"{shard} has two images for the key {key}, {images[key][0]} and {entry.name}; "
                "keys must differ"
            )
        else:
            images[key] = entry.name, Member(shard, key, target.offset_data, target.size)
    return [(member, texts.get(key, {})) for key, (_, member) in images.items()]


def _target(
    shard: Path, entry: tarfile.TarInfo, known: dict[str, tarfile.TarInfo]
) -> tarfile.TarInfo:
    """The member with the content; for links, their target."""
    found: tarfile.TarInfo | None = entry
    if entry.islnk():
        found = known.get(entry.linkname)
    elif entry.issym():
        place = posixpath.dirname(entry.name)
        found = known.get(posixpath.normpath(posixpath.join(place, entry.linkname)))
    if found is None:
        raise UserError(f"{shard}: {entry.name} is a link to {entry.linkname}, which is not in it")
    if not found.isfile() or found.issparse():
        raise UserError(f"{shard}: {entry.name} is not a plain file")
    return found


def _text(shard: Path, archive: tarfile.TarFile, entry: tarfile.TarInfo) -> str:
    if entry.size > _LARGEST_TEXT:
        raise UserError(f"{shard}: {entry.name} is not the text of a sample, {entry.size} bytes")
    content: Any = archive.extractfile(entry)
    return decode_text(content.read(), f"{shard}: {entry.name}").strip()


def _row(member: Member, texts: dict[str, str], label_column: str, caption_column: str) -> Row:
    place = f"{member.shard}: {member.key}"
    values = parse_object(texts.get(".json", "{}"), f"{place}.json")
    row = {k: values[k] for k in (label_column, caption_column) if k in values}
    if ".cls" in texts:
        row[label_column] = texts[".cls"]
    if ".txt" in texts:
        row[caption_column] = texts[".txt"]
    return Row(place, row)
