"""Triton kernels of the fused operator; `mhla_gen/ops/README.md` says how they fit together."""
