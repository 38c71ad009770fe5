"""The machine: devices, processes, compilation, CUDA graphs."""
