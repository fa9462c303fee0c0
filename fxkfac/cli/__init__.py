"""The command line: `fxkfac trace|draw|check|factors|report|bench TARGET`."""

from fxkfac.cli.entry import main

__all__ = ["main"]
