"""`ovshim run script.py args…`: a program as it stands, accelerated.

The script is to find everything as under `python script.py`; so nothing of torch is imported before
it does so itself, and what is ours waits for that.
"""

from __future__ import annotations

import argparse
import atexit
import builtins
import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import io
import json
import os
import runpy
import sys
import types
from collections.abc import Sequence
from typing import Any

from ovshim.errors import OptionError

__all__ = ["add", "prepare", "run", "split"]

_ARGUMENTS = "_OVSHIM_ARGUMENTS"  # as `ovshim.scope.program` has it, which imports torch
_WITHOUT_VALUE = frozenset({"-h", "--help", "--quiet"})


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    command = commands.add_parser(
        "run",
        help="run a script with its modules accelerated",
        description="Run a script, or with -m a module, as Python would, and accelerate the "
        "torch.nn.Modules that it calls. At the end a table on stderr says which, how, and how "
        "much time that saved.",
        usage="ovshim run [options] (script.py | directory | -m module) [arguments ...]",
    )
    command.add_argument("-m", dest="module", metavar="module", help="run a module, as python -m")
    command.add_argument("script", nargs="?", help="a file, or a directory with a __main__.py")
    command.add_argument("arguments", nargs="*", help="what the script is given")
    command.add_argument("--device", help="as `ovshim devices` names it (CPU)")
    command.add_argument("--precision", help="fp32, bf16 or fp16 (each module's own)")
    command.add_argument("--prefer", choices=["faster", "openvino"], help="(faster)")
    command.add_argument(
        "--include", action="append", metavar="PATTERN", help="only modules of such classes"
    )
    command.add_argument(
        "--exclude", action="append", metavar="PATTERN", help="leave modules of such classes alone"
    )
    command.add_argument("--min-speedup", type=float, help="less than this is left alone (1.05)")
    command.add_argument("--report", metavar="FILE.json", help="write the table as JSON as well")
    command.add_argument("--quiet", action="store_true", help="no table")
    command.set_defaults(run=run)


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments of `ovshim run` up to the script or module, and the script's own."""
    n = 0
    while n < len(arguments) and arguments[n].startswith("-") and arguments[n] != "-":
        if arguments[n] == "--":
            return [*arguments[:n], *arguments[n + 1 : n + 2]], list(arguments[n + 2 :])
        if arguments[n] == "-m":
            return list(arguments[: n + 2]), list(arguments[n + 2 :])
        n += 1 if arguments[n] in _WITHOUT_VALUE or "=" in arguments[n] else 2
    return list(arguments[: n + 1]), list(arguments[n + 1 :])


def prepare(chosen: argparse.Namespace) -> None:
    """Look at the arguments, before the script has done half its work. Raises OptionError."""
    from ovshim.arguments import check_min_speedup, class_patterns
    from ovshim.options import enabled_in_environment, resolve
    from ovshim.runtime import check_device

    if chosen.module is None and chosen.script is None:
        raise OptionError("script", None, "a file, a directory, or -m and a module", "Name one.")
    if chosen.report is not None and not os.path.isdir(
        os.path.dirname(os.path.abspath(chosen.report))
    ):
        remedy = "Make the directory first."
        raise OptionError("report", chosen.report, "a file in a directory that exists", remedy)
    if chosen.min_speedup is not None:
        check_min_speedup(chosen.min_speedup)
    for name in ("include", "exclude"):
        class_patterns(name, getattr(chosen, name) or ())
    options = resolve(None, _given(chosen, "device", "precision", "prefer"))
    if enabled_in_environment() and options.device != "CPU":
        check_device(options.device)


def run(chosen: argparse.Namespace) -> int:
    """Run it. Whatever the program raises goes through, as its own end."""
    if not chosen.quiet:
        atexit.register(_print_table, os.getpid())
    # Children that import torch read them, where ovshim is installed.
    if not os.environ.get("OVSHIM", "").strip():
        os.environ["OVSHIM"] = "1"
    names = ("device", "precision", "prefer", "include", "exclude", "min_speedup")
    os.environ[_ARGUMENTS] = json.dumps(_given(chosen, *names))
    if chosen.report is not None:
        os.environ["OVSHIM_REPORT"] = os.path.abspath(chosen.report)
    _when_torch_is_there()
    try:
        if chosen.module is not None:
            return _run_module(chosen.module, chosen.arguments)
        return _run_script(chosen.script, chosen.arguments)
    except SystemExit:
        raise
    except BaseException:
        _hide_our_frames()
        raise


def _given(chosen: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(chosen, name) for name in names if getattr(chosen, name) is not None}


def _when_torch_is_there() -> None:
    if "torch" in sys.modules:
        _start()
    else:
        sys.meta_path.insert(0, _Watch())


def _start() -> None:
    from ovshim.options import enabled_in_environment

    if enabled_in_environment():
        from ovshim.scope import program

        program.start()


class _Watch(importlib.abc.MetaPathFinder):
    """Starts the acceleration when torch has been imported."""

    def find_spec(
        self, name: str, path: Any, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        loader: Any = None if spec is None else spec.loader
        if loader is not None:
            execute = loader.exec_module

            def exec_module(module: types.ModuleType) -> None:
                del loader.exec_module  # the class's own is there again
                execute(module)
                _start()

            loader.exec_module = exec_module
        return spec


# --- as Python does it ----------------------------------------------------------------------------


def _run_script(path: str, arguments: list[str]) -> int:
    sys.argv = [path, *arguments]
    if path != "-" and (os.path.isdir(path) or not path.endswith((".py", ".pyw"))):
        whole = os.path.abspath(path)
        if _importer(whole):
            _replace_first_path(whole)
            _as_main()
            runpy._run_module_as_main("__main__", alter_argv=False)  # type: ignore[attr-defined]
            return 0
    file = "<stdin>" if path == "-" else os.path.abspath(path)
    try:
        source = _read(path, file)
    except OSError as error:
        atexit.unregister(_print_table)
        print(f"ovshim: can't open file {file!r}: {error}", file=sys.stderr)
        return 2
    _replace_first_path("" if path == "-" else os.path.dirname(os.path.realpath(path)))
    main = _as_main()
    if path != "-":
        main.__dict__["__file__"] = file
        main.__dict__["__cached__"] = None
        main.__loader__ = importlib.machinery.SourceFileLoader("__main__", file)
    # dont_inherit: our own `from __future__` is not the script's.
    code = compile(source, file, "exec", dont_inherit=True)
    exec(code, main.__dict__)
    return 0


def _read(path: str, file: str) -> bytes:
    if path == "-":
        return sys.stdin.buffer.read()
    with io.open_code(file) as opened:
        return opened.read()


def _run_module(name: str, arguments: list[str]) -> int:
    sys.argv = [sys.argv[0], *arguments]
    _replace_first_path(os.getcwd())
    _as_main()
    runpy._run_module_as_main(name)  # type: ignore[attr-defined]
    return 0


def _importer(path: str) -> Any:
    """What imports from a directory or a zip file; None for a plain script."""
    import pkgutil

    importer: Any = pkgutil.get_importer(path)
    return importer if importer is not None and importer.find_spec("__main__") else None


def _replace_first_path(path: str) -> None:
    """sys.path begins with where the script lies, and not with where ovshim was started from."""
    if not sys.flags.safe_path:
        sys.path[:1] = [path]


_former_main: types.ModuleType | None = None


def _as_main() -> types.ModuleType:
    """A fresh `__main__`, there to stay: what the script pickles refers to it, and threads that
    outlive the script look into it."""
    global _former_main
    _former_main = sys.modules["__main__"]
    main = types.ModuleType("__main__")
    main.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = main
    return main


def _hide_our_frames() -> None:
    """The interpreter prints the traceback after we have gone: it shall begin where the script
    does. Only now, for the script may have put a hook of its own there."""
    hook = sys.excepthook

    def excepthook(
        kind: type[BaseException], error: BaseException, trace: types.TracebackType | None
    ) -> None:
        error.__traceback__ = _theirs(trace)
        hook(kind, error, error.__traceback__)

    sys.excepthook = excepthook


def _theirs(trace: types.TracebackType | None) -> types.TracebackType | None:
    """What is below the frame that runs the script."""
    ours = (_run_script.__code__, _run_module.__code__)
    at = trace
    while at is not None and at.tb_frame.f_code not in ours:
        at = at.tb_next
    return trace if at is None else at.tb_next


def _print_table(process: int) -> None:
    from ovshim.options import enabled_in_environment

    if os.getpid() != process or sys.stderr is None:
        return  # a child that was forked
    scope = sys.modules.get("ovshim.scope")
    summary = None if scope is None else scope.process_report()
    if not enabled_in_environment():
        text = "ovshim: switched off by OVSHIM=0"
    else:
        text = "ovshim: torch was not imported" if summary is None else str(summary)
    with contextlib.suppress(OSError, ValueError):  # the script may have closed it
        print(text, file=sys.stderr)
