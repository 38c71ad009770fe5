"""The folder of a cache: whether these settings may write to it. It is asked before torch loads."""

from mhla_gen.config import CacheConfig
from mhla_gen.outputs.folders import check_writable, made_with

# Two runs may differ in these: paths are known by content, and the rest does not change it.
_FREE = (
    "output_dir",
    "data.path",
    "data.failed_reads",
    "vae.path",
    "text.path",
    "text.batch_size",
    "image_encoder.path",
    "batch_size",
    "num_workers",
    "clips.timeout",
    "retry_quarantined",
    "verify",
    "device",
)


def check_output_dir(config: CacheConfig) -> None:
    """Raise if `output_dir` has another cache, or files that are not ours.

    Raises:
        FileExistsError: Naming the settings that differ.
        PermissionError: If it cannot be written.
    """
    made_with(config.output_dir, config, _FREE)
    check_writable(config.output_dir)
