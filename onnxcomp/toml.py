"""The TOML parser, by either of its names."""

import sys

if sys.version_info >= (3, 11):
    import tomllib
else:  # the same parser under its older name
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

__all__ = ["tomllib"]
