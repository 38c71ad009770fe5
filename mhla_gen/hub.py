"""Folders and names on Hugging Face's hub."""

from pathlib import Path


def is_pipeline(path: str) -> bool:
    """Whether a folder or a repository on the hub is a whole pipeline.

    Without a network, repositories that were downloaded before are found.

    Raises:
        ValueError: If it can be neither.
    """
    if Path(path).is_dir():
        return (Path(path) / "model_index.json").is_file()
    if path.count("/") != 1:
        raise ValueError(f"{path} is neither a folder nor the name of a repository")
    from diffusers import DiffusionPipeline

    try:
        DiffusionPipeline.load_config(path)
    except OSError:
        return False
    return True
