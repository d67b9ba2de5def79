"""Oracles, checks and fixtures that the test files share."""
