"""The exception for a user's mistake, or for an input the project will not work on.

Its text is printed without a traceback after the names of the stage and the recipe, which it need not repeat.
It is whole sentences: what was given, what is allowed, how to mend it.
"""


class Refusal(Exception):
    """An input refused by name; no artifact has been written."""


class Unreadable(Refusal):
    """Files that cannot be read. Finished work made from them stays, as they may be readable later."""
