"""`Unkeyable`."""

from __future__ import annotations


class Unkeyable(Exception):
    """A module that no key can be made for: `where` it holds `what`."""

    def __init__(self, where: str, what: str) -> None:
        super().__init__(where, what)
        self.where = where
        self.what = what

    def __str__(self) -> str:
        return f"{self.where or 'the module'} holds {self.what}, which no cache key can stand for"
