"""`enabled`, `disabled`, `enable`, `disable`: whole programs, as they stand."""

from __future__ import annotations

import atexit
import functools
import inspect
import logging
import os
import threading
from collections.abc import AsyncGenerator, Callable, Iterable
from typing import Any, Literal, ParamSpec, Self, TypeVar, Unpack

from torch.utils._contextlib import _wrap_generator

from ovshim.arguments import check_min_speedup, class_patterns
from ovshim.errors import OptionError
from ovshim.options import OptionFields, Options, enabled_in_environment, quantizes, resolve
from ovshim.properties import check_placement
from ovshim.scope.calls import end, enter, last_here
from ovshim.scope.found import Finder
from ovshim.scope.summary import Summary
from ovshim.stays import Entry

__all__ = ["Scope", "Stay", "disable", "disabled", "enable", "enabled"]

log = logging.getLogger("ovshim")

P = ParamSpec("P")
R = TypeVar("R")

# They are said of one module, and here are many.
_NOT_OF_MANY = ("inplace", "memory", "methods", "dynamic_shapes")


class Stay:
    """A context manager, and a decorator of functions, coroutines and generators of both kinds.

    It may be entered again, inside itself as well, and by several threads at once. What was there
    is there again when it is left, in whatever order and thread that happens.
    """

    _finder: Finder | None = None
    _everywhere = False
    _off = True

    def __init__(self) -> None:
        self._entries: list[Entry] = []

    def __enter__(self) -> Self:
        entry = Entry(self._finder, self._off)
        self._entries.append(entry)
        enter(entry, in_context=True, everywhere=self._everywhere)
        return self

    def __exit__(self, *exc: object) -> Literal[False]:
        # A generator may be closed in another context than it was entered in.
        entry = last_here(self._entries) or self._entries[-1]
        self._entries.remove(entry)
        end(entry)
        return False

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        if isinstance(function, type) or not callable(function):
            remedy = "Decorate the functions or methods that are to be inside, or use `with`."
            raise OptionError("function", function, "a function", remedy)
        if inspect.isasyncgenfunction(function):
            return _of_async_generator(self, function)  # type: ignore[return-value]
        if inspect.isgeneratorfunction(function):
            stepwise: Any = _wrap_generator(lambda: self, function)  # type: ignore[no-untyped-call]
            return stepwise  # type: ignore[no-any-return]
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def wait_for(*args: P.args, **kwargs: P.kwargs) -> Any:
                with self:
                    return await function(*args, **kwargs)

            return wait_for  # type: ignore[return-value]

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            with self:
                return function(*args, **kwargs)

        return call


def _of_async_generator(
    stay: Stay, function: Callable[P, AsyncGenerator[Any, Any]]
) -> Callable[P, AsyncGenerator[Any, Any]]:
    """The function with each step of its generators inside, and none of what is between them."""

    @functools.wraps(function)
    async def stepwise(*args: P.args, **kwargs: P.kwargs) -> AsyncGenerator[Any, Any]:
        steps = function(*args, **kwargs)
        step = steps.asend(None)
        while True:
            try:
                with stay:
                    given = await step
            except StopAsyncIteration:
                return
            try:
                sent = yield given
            except GeneratorExit:
                with stay:
                    await steps.aclose()
                raise
            except BaseException as error:
                step = steps.athrow(error)
            else:
                step = steps.asend(sent)

    return stepwise


class Scope(Stay):
    """Where the modules that are called are served by OpenVINO: what `enabled` gives.

    It keeps what it has found while it is left and entered again.
    """

    _off = False

    def __init__(
        self,
        options: Options,
        include: tuple[str, ...],
        exclude: tuple[str, ...],
        min_speedup: float,
        all_threads: bool,
        report: str | os.PathLike[str] | Callable[[Summary], Any] | None,
    ) -> None:
        super().__init__()
        self._told = report
        self._everywhere = all_threads
        self._own = Finder(options, include, exclude, min_speedup)

    @property
    def options(self) -> Options:
        """The options that modules are accelerated with."""
        return self._own.options

    def report(self) -> Summary:
        """What was found so far, and how it was served. `print` it, or take `to_dict()`."""
        return self._own.summary()

    def __enter__(self) -> Self:
        # OVSHIM=0 wins, also over a scope that was made before it was set.
        self._finder = self._own if enabled_in_environment() else None
        return super().__enter__()

    def __exit__(self, *exc: object) -> Literal[False]:
        super().__exit__(*exc)
        if self._told is not None and not self._entries:
            tell(self.report(), self._told)
        return False


def tell(summary: Summary, told: str | os.PathLike[str] | Callable[[Summary], Any]) -> None:
    """Give a report to where it was asked for. A file that cannot be written is a log line."""
    if callable(told):
        told(summary)
        return
    try:
        summary.write(told)
    except OSError as error:
        log.warning("the report was not written: %s", error)


def enabled(
    *,
    include: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
    min_speedup: float = 1.05,
    all_threads: bool = False,
    report: str | os.PathLike[str] | Callable[[Summary], Any] | None = None,
    options: Options | None = None,
    **fields: Unpack[OptionFields],
) -> Scope:
    """Accelerate whatever modules are called inside, without touching them.

        with ovshim.enabled() as scope:
            main()
        print(scope.report())

    The outermost modules that are called in evaluation mode are found; each is served by OpenVINO
    once it was called often enough for that to pay, and as long as it is faster. Until then, and
    for whatever OpenVINO cannot serve, eager answers; nothing is warned of, the report tells. After
    leaving, nothing is left of it. It is a decorator as well.

    Args:
        include: names of classes, or `fnmatch` patterns of them (plain, or with their module):
            only such modules, looked for from the outermost inwards.
        exclude: such modules are left alone, with everything inside them.
        min_speedup: a plan that is raced and is not faster than eager by this factor does not
            serve.
        all_threads: also in threads that are in no scope of their own; otherwise in this context
            alone (threads to which it is copied, and asyncio's tasks, follow).
        report: when it is left: a file to write the report to, as JSON, or a function to give it.
        options, fields: see `ovshim.Options`; fields win. Not `inplace`, `memory`, `methods` and
            `dynamic_shapes`, which are said of one module.

    Raises:
        OptionError: a value that cannot be right.
    """
    # By name first: of what has no meaning here it would be no help to say what it needs.
    given = dict(fields)
    for name in _NOT_OF_MANY:
        if name in given:
            raise _of_one(name, given[name])
    chosen, default = resolve(options, given), Options()
    for name in _NOT_OF_MANY:
        if getattr(chosen, name) != getattr(default, name):
            raise _of_one(name, getattr(chosen, name))
    _check(chosen, min_speedup, all_threads, report)
    names = class_patterns("include", include), class_patterns("exclude", exclude)
    return Scope(chosen, *names, float(min_speedup), all_threads, report)


def _of_one(name: str, given: Any) -> OptionError:
    remedy = "It is said of one module: use accelerate()."
    return OptionError(name, given, "nothing here", remedy)


def disabled() -> Stay:
    """Inside, eager answers every call, whatever scope is around it (`enabled`, `enable`, `ovshim
    run`), and for modules accelerated by name as well: their calls are counted with the reason
    `off`. An `enabled` within it ends that for its inside. Modules of `load` have no eager, and go
    on. In this context; a decorator as well."""
    return Stay()


_process: Scope | None = None
_last: Scope | None = None
_OWNER = "_OVSHIM_REPORT_OWNER"
_process_lock = threading.Lock()


def enable(
    *,
    include: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
    min_speedup: float = 1.05,
    report: str | os.PathLike[str] | Callable[[Summary], Any] | None = None,
    options: Options | None = None,
    **fields: Unpack[OptionFields],
) -> Scope:
    """`enabled` for the whole process, every thread of it, until `disable()`.

    Called again, its new arguments count from then on. Raises OptionError as `enabled` does.
    """
    global _process
    scope = enabled(
        include=include,
        exclude=exclude,
        min_speedup=min_speedup,
        all_threads=True,
        report=report,
        options=options,
        **fields,
    )
    with _process_lock:
        if _process is None:
            atexit.unregister(_write_at_exit)
            atexit.register(_write_at_exit)
        _own_report()
        former, _process = _process, scope
        entry = Entry(scope._own if enabled_in_environment() else None)
        scope._entries.append(entry)
        enter(entry, in_context=False, everywhere=True)
    if former is not None:
        former.__exit__()
    return scope


def disable() -> None:
    """Undo `enable()`. Without one it does nothing."""
    global _process, _last
    with _process_lock:
        former, _process = _process, None
        _last = former or _last
    if former is not None:
        former.__exit__()


def process_report() -> Summary | None:
    """What the scope of the whole process has found; None where there was none."""
    scope = _process or _last
    return None if scope is None else scope.report()


def _own_report() -> bool:
    """Whether the file that `OVSHIM_REPORT` names is this process's. Children inherit who was the
    first to ask."""
    path = os.environ.get("OVSHIM_REPORT", "")
    process, _, owned = os.environ.get(_OWNER, "").partition(":")
    if path and owned != path:
        os.environ[_OWNER] = f"{os.getpid()}:{path}"
        return True
    return process == str(os.getpid())


def _write_at_exit() -> None:
    """Write the report to `OVSHIM_REPORT`; child processes write theirs beside it."""
    path = os.environ.get("OVSHIM_REPORT")
    summary = process_report()
    if not path or summary is None:
        return
    if not _own_report():
        stem, suffix = os.path.splitext(path)
        path = f"{stem}.{os.getpid()}{suffix}"
    tell(summary, path)


def _check(options: Options, min_speedup: Any, all_threads: Any, report: Any) -> None:
    check_min_speedup(min_speedup)
    if not isinstance(all_threads, bool):
        raise OptionError("all_threads", all_threads, "True or False", "Give one of them.")
    if report is not None and not callable(report) and not isinstance(report, (str, os.PathLike)):
        remedy = "Give the name of a file, or a function that takes the report."
        raise OptionError("report", report, "a path, a function or None", remedy)
    if quantizes(options):
        from ovshim.precision import quantize

        quantize.require(options.precision)
    if enabled_in_environment():
        check_placement(options)
