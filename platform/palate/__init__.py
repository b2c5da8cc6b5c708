"""Palate learns people's taste in text and images and serves it."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("palate")
except PackageNotFoundError:  # a bare source tree on PYTHONPATH, as on a Ray worker
    __version__ = "0+unknown"
