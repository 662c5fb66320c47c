"""The version of this package, by itself so that nothing needs the package for it."""

__version__ = "0.1.0"
