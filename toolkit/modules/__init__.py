"""Roles: how an op takes the place of a module's forward. No module here knows transformers."""
