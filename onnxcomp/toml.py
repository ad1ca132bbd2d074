"""The TOML parser, by either of its names."""

import sys

if sys.version_info >= (3, 11):
    import tomllib as tomllib
else:  # the same parser under its older name
    pass  # pyright: ignore[reportMissingImports]
