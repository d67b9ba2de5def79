"""Structured output: which tokens an output may continue with, by a JSON schema, a regular expression or a grammar."""

from toolkit.engine.grammar.params import StructuredOutputsParams

__all__ = ["StructuredOutputsParams"]
