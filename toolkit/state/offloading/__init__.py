"""Offloaded prefixes: cached ones that the pool's blocks have no room for, in host memory and on disk."""

from toolkit.state.offloading.offloading import PrefixOffloading

__all__ = ["PrefixOffloading"]
