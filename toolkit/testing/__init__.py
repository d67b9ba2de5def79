"""Shared by the tests, ``toolkit verify`` and users' checks: small models, exact oracles, parity runs."""
