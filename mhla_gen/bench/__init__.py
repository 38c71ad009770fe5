"""Latency and memory of attention operators and of whole models; see `mhla_gen.bench.benchmark`."""
