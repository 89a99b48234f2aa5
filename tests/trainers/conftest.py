"""Modules beside the tests are importable by ranks."""
