"""What the program's own signal handlers raise while a plan is made: a timeout by SIGALRM, the soft
limit of a task queue.

Such an exception comes out of whatever line the main thread has reached, and torch's code, the
module's and ours catch whatever comes there. So the handlers are asked, and what one of them has
raised ends the build after all, as KeyboardInterrupt does. To ask every exception that is caught
where it comes from would be a line in each of a hundred places; in an inference, where there is no
time to ask handlers, it is one line in three.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

__all__ = ["comes_here", "heard", "let_through", "raise_heard"]

_Handler = Callable[[int, Any], Any]

_OURS = os.path.dirname(__file__) + os.sep

# Of the build that the main thread is about; None: it is about none.
_raised: list[Exception] | None = None


@contextlib.contextmanager
def heard() -> Iterator[None]:
    """What signal handlers raise inside may be caught by anybody: it is raised again at the end."""
    global _raised
    if _raised is not None or not comes_here():
        yield
        return
    raised: list[Exception] = []
    _raised = raised
    noting = _note(raised)
    try:
        yield
    except Exception:
        raise_heard()
        raise
    else:
        raise_heard()
    finally:
        _raised = None
        for number, (handler, ours) in noting.items():
            if signal.getsignal(number) is ours:  # else the module has installed its own
                signal.signal(number, handler)
        raised.clear()  # its traceback leads here


def raise_heard() -> None:
    """Raise what a signal handler has raised since the build began: asked before anything is kept
    of a failure, and now and then."""
    if _raised and comes_here():
        raise _raised[0]


def let_through(error: Exception) -> None:
    """Raise an exception again that comes out of a signal handler; else do nothing."""
    raise_heard()  # in a build what is installed are our own
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    theirs = {frame.f_code for frame in frames if not frame.f_code.co_filename.startswith(_OURS)}
    # As a rule there is nobody's code but ours in it, and OpenVINO's that is not Python's.
    if theirs and comes_here():
        handlers = map(_code_of, map(signal.getsignal, signal.valid_signals()))
        if not theirs.isdisjoint(handlers):
            try:
                raise error
            finally:
                # Its traceback leads here: it would hold itself, and whatever the frames between
                # hold, until the collector comes.
                del error, frames


def _code_of(handler: Any) -> CodeType | None:
    if not callable(handler):  # a default, or not Python's
        return None
    while isinstance(handler, functools.partial):
        handler = handler.func
    function = handler if hasattr(handler, "__code__") else getattr(handler, "__func__", None)
    return getattr(function or type(handler).__call__, "__code__", None)


def comes_here() -> bool:
    """Whether this thread is the one that Python runs signal handlers in."""
    return threading.current_thread() is threading.main_thread()


def _note(raised: list[Exception]) -> dict[int, tuple[_Handler, _Handler]]:
    """Have the handlers note what they raise; by signal, each and what stands in its place."""
    noting: dict[int, tuple[_Handler, _Handler]] = {}
    for number in signal.valid_signals():
        handler = signal.getsignal(number)
        # Nobody catches a KeyboardInterrupt.
        if callable(handler) and handler is not signal.default_int_handler:
            noting[number] = handler, _noting(handler, raised)
            signal.signal(number, noting[number][1])
    return noting


def _noting(handler: _Handler, raised: list[Exception]) -> _Handler:
    def note(number: int, frame: Any) -> Any:
        try:
            return handler(number, frame)
        except Exception as error:
            raised.append(error)
            raise

    return note
