"""The version, read by the build and by `mhla_gen.__version__`, and those of other packages."""

import importlib.metadata

__version__ = "0.1.0"


def installed(package: str) -> str | None:
    """The version of an installed package; None if it is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
