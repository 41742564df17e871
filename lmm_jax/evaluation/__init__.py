"""Benchmarks: a table of them, what each reads and how it is scored, and one runner for all (evaluation spec)."""
