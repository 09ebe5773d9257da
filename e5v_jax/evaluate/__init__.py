"""Benchmarks of the paper, scored and shown beside its figures."""
