"""One number that rises with every change of policy, bundles or deny list, so that a change binds requests already under way."""

from __future__ import annotations


class Generation:
    """Compared inside the intent's transaction, before the token is asked, and before the outcome is recorded."""

    def __init__(self) -> None:
        self._number = 0

    @property
    def number(self) -> int:
        """The current generation. Safe to read from any thread."""
        return self._number

    def advance(self) -> None:
        """Something that decisions depend on has just changed."""
        self._number += 1
