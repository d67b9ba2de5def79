"""Sizes of the Triton kernel that gives the gradients of rows of keys, as data."""

from dataclasses import dataclass


@dataclass(frozen=True)
class KeyTile:
    """One program: one row of keys, ``heads`` query heads of a query at a time."""

    heads: int
    warps: int


KEYS = KeyTile(4, 8)
