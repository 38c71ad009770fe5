"""The machine: devices, processes that share work, compiled and recorded models."""
