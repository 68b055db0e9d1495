"""What ovshim raises and warns of.

    OvshimError
      OptionError (ValueError)        a value that cannot be right
        CalibrationError              no calibration data, or data that does not fit the calls
      FallbackError (RuntimeError)    strict only: what would have fallen back, with its reason
      ArtifactError                   a file or directory that cannot be loaded or saved
    OvshimWarning (UserWarning)
      FallbackWarning                 a module, or some of its calls, runs in eager
      PrecisionWarning                computed in another precision than asked for

Each carries its parts as fields, survives pickling, and says the remedy last.
"""

import pickle
from typing import Any

from .reasons import Reason

_LONGEST_VALUE = 200


def _shown(value: object) -> str:
    """`repr` of a value, cut: a module or tensor given by mistake may be screens long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 1] + "…"


# The constructors hand their arguments on unchanged and __str__ writes the message, because
# BaseException pickles as `type(*args)`: with the message in `args` every class would need a
# __reduce__ that is easily forgotten in a subclass.


class OvshimError(Exception):
    """What every error of ovshim's own is."""


class OvshimWarning(UserWarning):
    """What every warning of ovshim's own is."""


class OptionError(OvshimError, ValueError):
    """A configuration mistake: it raises at once and never falls back.

    `name`: the option or argument; `value`: what was given; `allowed`: what may be given,
    as a phrase; `remedy`: a sentence.
    """

    def __init__(self, name: str, value: object, allowed: str, remedy: str) -> None:
        super().__init__(name, value, allowed, remedy)
        self.name = name
        self.value = value
        self.allowed = allowed
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.name}={_shown(self.value)}: allowed is {self.allowed}. {self.remedy}"

    def __reduce__(self) -> tuple[Any, ...]:
        # The value is whatever the user gave. A lambda or a locked object must not keep the error
        # from crossing to the process that waits for it, so such a value travels as its repr.
        value = self.value
        try:
            pickle.dumps(value)
        except Exception:  # any type may raise anything from its own __reduce__
            value = _shown(value)
        return type(self), (self.name, value, self.allowed, self.remedy)


class CalibrationError(OptionError):
    """No calibration data, or data that does not fit the calls it is for."""


class FallbackError(OvshimError, RuntimeError):
    """With `strict=True`: what would have run in eager. `reason` says why."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return str(self.reason)


class FallbackWarning(OvshimWarning):
    """A module, a part of it, or some of its calls run in eager: once per module and reason.

    `reason` says why, `module` is the name of the module's class or its path.
    """

    def __init__(self, reason: Reason, module: str) -> None:
        super().__init__(reason, module)
        self.reason = reason
        self.module = module

    def __str__(self) -> str:
        return f"{self.module} runs in eager, as a whole or in part. {self.reason}"


class _About(Exception):
    """The parts that the remaining classes share: what it is about, what is wrong, the remedy."""

    def __init__(self, value: str, problem: str, remedy: str) -> None:
        super().__init__(value, problem, remedy)
        self.value = value
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.value}: {self.problem} {self.remedy}"


class ArtifactError(_About, OvshimError):
    """A file or directory that cannot be loaded or saved; `value` is its path."""


class PrecisionWarning(_About, OvshimWarning):
    """Computed in another precision than asked for; `value` is the precision asked for."""
