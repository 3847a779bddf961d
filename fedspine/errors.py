"""Errors a person can cause: each names the field, the value, the bound and the remedy.

The command line prints the message of a `FedSpineError` as it is and exits with code 2. Anything else is a bug
and keeps its traceback.
"""

from __future__ import annotations


class FedSpineError(Exception):
    """Base of every error that a user can cause and mend."""


class ConfigError(FedSpineError):
    """A configuration key is unknown, of the wrong type or out of bounds."""


class DataError(FedSpineError):
    """The data set, its columns, its labels or its partition cannot be used."""


class ModelError(FedSpineError):
    """The model cannot be loaded, has no family entry, or cannot reach the sparsity."""


class PopulationError(FedSpineError):
    """The device catalogue cannot be read or does not fit."""


class CheckpointError(FedSpineError):
    """A run directory is in use, absent, incomplete or of another configuration."""


class FederationError(FedSpineError):
    """A round cannot be finished, for example because too few devices replied."""


class CertificateError(FedSpineError):
    """A certificate or a key is absent, wrong, or would be overwritten."""
