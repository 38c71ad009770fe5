"""What a name means: a folder, or a repository on the Hugging Face hub."""

from pathlib import Path


def is_pipeline(path: str) -> bool:
    """Whether a folder or a repository on the hub is a whole pipeline.

    Raises:
        ValueError: If it is neither a folder nor a repository that can be reached.
    """
    if Path(path).is_dir():
        return (Path(path) / "model_index.json").is_file()
    from huggingface_hub import file_exists
    from huggingface_hub.errors import HFValidationError

    try:
        return file_exists(path, "model_index.json")
    except HFValidationError as error:
        raise ValueError(f"{path} is neither a folder nor the name of a repository") from error
    except Exception as error:  # no network, or an unknown name: the hub's errors have no base
        raise ValueError(f"{path} is no folder, and the hub does not answer: {error}") from error
