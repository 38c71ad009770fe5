"""Files: written whole or not at all, read with clear errors if damaged, identified by digests.

Everything is written here: under a temporary name, and flushed to the disk (`fsync`) before it gets
its final name, so that neither a kill nor a power loss leaves half a file.
"""

from mhla_gen.files.claims import (
    claim,
    is_claimed,
    make_folder,
    release,
    require_claimed,
)
from mhla_gen.files.temporary import (
    flush,
    is_temporary,
    partial_of,
    put,
    remove,
    remove_leftovers,
)
from mhla_gen.files.writing import (
    WriteError,
    append_line,
    errors_naming,
    write_arrays,
    write_json,
    write_lines,
    write_picture,
    write_tensors,
    write_text,
    written_whole,
)

__all__ = [
    "WriteError",
    "append_line",
    "claim",
    "errors_naming",
    "flush",
    "is_claimed",
    "is_temporary",
    "make_folder",
    "partial_of",
    "put",
    "release",
    "remove",
    "remove_leftovers",
    "require_claimed",
    "write_arrays",
    "write_json",
    "write_lines",
    "write_picture",
    "write_tensors",
    "write_text",
    "written_whole",
]
