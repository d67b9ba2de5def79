"""What the tests, ``toolkit verify`` and users' own checks share: small models, exact oracles, parity runs."""
