"""Mathematics: one folder per op. Importing this package loads nothing."""

IGNORED = -100
"""The target of a row that does not count, as in torch's and transformers' losses."""
