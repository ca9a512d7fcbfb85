"""The one error of loading and saving models."""

from __future__ import annotations


class ModelError(ValueError):
    """A directory, or params, that are no model of `models/`, and why."""
