"""The one exception that stands for a user's mistake or an input the project will not work on.

Its text is shown without a traceback after the names of stage and recipe, which it need not repeat, so it is
whole sentences: what was given, what is allowed, and how to mend it.
"""


class Refusal(Exception):
    """An input refused by name; no artifact has been written when it is raised."""


class Unreadable(Refusal):
    """Files that cannot be read. What was made from them before stays, as they may be read another time."""
