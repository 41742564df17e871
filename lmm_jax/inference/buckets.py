"""Sizes that shapes are rounded up to, so that few programs are compiled whatever is asked."""

from __future__ import annotations


def power_of_two(n: int) -> int:
    """The first of 1, 2, 4, 8, … that is at least `n`."""
    return 1 << max(n - 1, 0).bit_length()


def half_steps(n: int) -> int:
    """The first of 1, 2, 3, 4, 6, 8, 12, 16, 24, … that is at least `n`."""
    size = power_of_two(n)
    return size * 3 // 4 if size * 3 // 4 >= n and size > 2 else size


def length_bucket(n: int) -> int:
    """Room for `n` tokens: 24, 32, 48, 64, 96, 128, …, so that at most a third of it is padding where `n` is no less."""
    return max(24, half_steps(n))


def power_below(n: int) -> int:
    """The last of 1, 2, 4, … that is at most `n`, or 1."""
    return power_of_two(n + 1) // 2 or 1
