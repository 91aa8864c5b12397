"""Benchmarks: what is measured on a model in memory, dense or compressed."""
