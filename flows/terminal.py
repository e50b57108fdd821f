"""The console that everything prints to, wide enough for tables where there is no terminal to measure."""

import sys

from rich.console import Console

console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
