"""A lock that goes to the thread that waits for longest."""

from __future__ import annotations

import threading
from typing import Any


class Turns:
    """
    Lets threads take turns, in the order in which they ask.

    `threading.Lock` promises no order: a thread that releases it and takes it again mostly gets it.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._tickets = 0  # given so far
        self._turn = 0  # the ticket that may run

    def __enter__(self) -> Turns:
        with self._condition:
            ticket = self._tickets
            self._tickets += 1
            self._condition.wait_for(lambda: self._turn == ticket)
        return self

    def __exit__(self, *exception: Any) -> None:
        with self._condition:
            self._turn += 1
            self._condition.notify_all()

    def pass_on(self) -> None:
        """Within a turn: let those run that wait."""
        self.__exit__()
        self.__enter__()
