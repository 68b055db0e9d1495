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
import ctypes
import functools
import inspect
import itertools
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any

__all__ = ["comes_here", "heard", "let_through", "let_through_inference", "raise_heard"]

_Handler = Callable[[int, Any], Any]

# More than a `struct sigaction` has anywhere.
_ACTION_BYTES = 1024

_OURS = os.path.dirname(__file__) + os.sep
# Classes of the exceptions that come out of an inference, and where those of libraries are from.
_OF_INFERENCES = frozenset(
    {RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, NotImplementedError}
    | {MemoryError, OverflowError, SystemError, OSError}
)
_LIBRARIES = ("numpy", "torch", "openvino", "ovshim")

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
                _install(number, handler)
        raised.clear()  # its traceback leads here


def raise_heard() -> None:
    """Raise what a signal handler has raised since the build began: asked before anything is kept
    of a failure, and now and then."""
    if _raised and comes_here():
        raise _raised[0]


def let_through(error: Exception) -> None:
    """Raise an exception again that comes out of a signal handler; else do nothing."""
    raise_heard()  # in a build what is installed are our own
    if comes_here() and _is_a_handlers(error):
        try:
            raise error
        finally:
            # Its traceback leads here: it would hold itself, and whatever the frames between hold,
            # until the collector comes.
            del error


def let_through_inference(error: Exception) -> None:
    """The same of what an inference has raised. OpenVINO raises Python's own exceptions and no
    others: one of the program's was put into this thread from outside, as libraries for timeouts
    do (`PyThreadState_SetAsyncExc`)."""
    kind = type(error)
    try:
        if kind not in _OF_INFERENCES and kind.__module__.partition(".")[0] not in _LIBRARIES:
            raise error
        let_through(error)
    finally:
        del error


def _is_a_handlers(error: Exception) -> bool:
    """Whether it comes out of a handler that is installed, or that was when it was called: it may
    have put another in its place before it raised."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    theirs = [frame for frame in frames if not frame.f_code.co_filename.startswith(_OURS)]
    if not theirs:  # as a rule: there is nobody's code but ours in it, and none of OpenVINO's
        return False
    handlers = map(_code_of, map(signal.getsignal, signal.valid_signals()))
    if not {frame.f_code for frame in theirs}.isdisjoint(handlers):
        return True
    return any(map(_was_given_a_signal, theirs))


def _was_given_a_signal(frame: FrameType) -> bool:
    """Whether it was called as handlers are: with the number of a signal and a frame."""
    code, values = frame.f_code, frame.f_locals
    given = [values.get(name) for name in code.co_varnames[: code.co_argcount]]
    if code.co_flags & inspect.CO_VARARGS:
        more = values.get(code.co_varnames[code.co_argcount + code.co_kwonlyargcount])
        given += more if isinstance(more, tuple) else ()
    return any(
        isinstance(number, int) and isinstance(place, FrameType)
        for number, place in itertools.pairwise(given)
    )


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
            _install(number, noting[number][1])
    return noting


def _install(number: int, handler: _Handler) -> None:
    """Put one handler of Python's in the place of another. What the system calls stays: it may be
    faulthandler's, which calls Python's, and `siginterrupt` has set flags there."""
    action = ctypes.create_string_buffer(_ACTION_BYTES)
    sigaction = _sigaction()
    known = sigaction is not None and sigaction(number, None, action) == 0
    signal.signal(number, handler)
    if sigaction is not None and known:
        sigaction(number, action, None)


@functools.cache
def _sigaction() -> Callable[[int, Any, Any], int] | None:
    """The system's own; None where there is none, as on Windows."""
    try:
        return ctypes.CDLL(None).sigaction
    except (AttributeError, OSError, TypeError):
        return None


def _noting(handler: _Handler, raised: list[Exception]) -> _Handler:
    def note(number: int, frame: Any) -> Any:
        try:
            return handler(number, frame)
        except Exception as error:
            raised.append(error)
            raise

    return note
