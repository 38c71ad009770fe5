"""The version, read by the build and by `mhla_gen.__version__`."""

__version__ = "0.1.0"
