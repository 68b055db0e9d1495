"""The version of the package: in what users are told, and in every key of the cache."""

__version__ = "0.1.0"
