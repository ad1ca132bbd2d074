"""The command line: the only package that prints or exits."""

from onnxcomp.cli import commands, quantize
from onnxcomp.cli.shell import INTERRUPTED, main

__all__ = ["INTERRUPTED", "commands", "main", "quantize"]
