"""Whether params.yaml may run programs and code that it names, as it may be a stranger's."""

import os

ALLOW = "PRUNEQUANT_ALLOW_COMMANDS"
"""The environment variable without which nothing of the kind runs."""


def commands_are_allowed() -> bool:
    """Tell whether the environment allows it."""
    return os.environ.get(ALLOW) == "1"
