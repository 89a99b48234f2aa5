"""Checks before a model is changed, and across ranks."""
