"""`fast.ovshim`: the one name of ours on an accelerated module."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from ovshim.arguments import check_timeout, path_of
from ovshim.bound import installed
from ovshim.builder import wait_for
from ovshim.decode import encoder_of
from ovshim.dispatch import Dispatcher
from ovshim.errors import ArtifactError, OptionError
from ovshim.example import as_call
from ovshim.options import Options

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from concurrent.futures import Future

    from ovshim.report import Report

__all__ = ["Handle", "report_of"]


class Handle:
    """What can be asked of an accelerated module, and told it.

    It knows nothing but the module: copies and unpickled modules get their own.
    """

    _ovshim_transparent = True

    # Not in a pickle: the methods take the options along, and may have to leave some behind.
    _options: Options | None = None

    def __init__(self, module: nn.Module, options: Options | None = None) -> None:
        self._module = module
        self._options = options

    def __getstate__(self) -> dict[str, Any]:
        return {"_module": self._module}

    def renewed(self, module: nn.Module) -> Handle:
        """A handle of the same sort for a copy of the module."""
        return Handle(module, self._options)

    @property
    def options(self) -> Options:
        """The options that the module was accelerated with."""
        dispatchers = self._dispatchers
        # None where the user has put a method of his own over ours.
        return dispatchers[0].options if dispatchers else self._options or Options()

    def report(self) -> Report:
        """How the module has been served so far; `ovshim.explain(fast)` is the same."""
        encoder = self._encoder
        return dataclasses.replace(
            report_of(type(self._module).__qualname__, self.options, self._dispatchers),
            encoder=None if encoder is None else encoder.report(),
        )

    def stats(self) -> dict[str, int]:
        """Number of calls by path."""
        return dict(self.report().calls)

    def reset_stats(self) -> None:
        """Set every counter of calls back to 0."""
        for dispatcher in self._all_dispatchers:
            dispatcher.tally.reset()

    def refresh(self) -> None:
        """Drop every plan and build anew at the next call.

        Needed after a write that torch does not count: into `.data`, or a NumPy view.
        """
        for dispatcher in self._all_dispatchers:
            dispatcher.refresh()

    def warm(self, *examples: Any) -> None:
        """Make the plans for these examples now (each in the forms of `example_input`).

        Raises:
            OptionError: an example that the module itself refuses, or in none of the forms.
            FallbackError: `strict`, and eager would serve it.
        """
        for example in examples:
            for dispatcher in self._dispatchers:
                dispatcher.prepare(*as_call(example, None))

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until no plan is being made in another thread (see `background`), and make what a
        first call without an example has left to later ones.

        Returns whether that was so within `timeout` seconds; None: however long it takes.

        Raises OptionError: `timeout` is no number of seconds.
        """
        check_timeout(timeout)
        return wait_for((dispatcher.wait for dispatcher in self._all_dispatchers), timeout)

    def map(self, items: Iterable[Any], in_flight: int | None = None) -> Iterator[Any]:
        """The module's answers to `items`, in order, with several calls under way at once.

        What reaches OpenVINO is computed ahead of its turn, from copies of the inputs; all that
        eager has to answer is answered at its turn, in the thread that asks for the answer.

        Args:
            items: each in the forms of `example_input`.
            in_flight: how many calls at once; None: one more than OpenVINO advises (with
                `hint="throughput"` or `streams=` it advises several), and one where it advises one
                or calls are too short for more to pay. Twice as many items are read before the
                first of them has been answered.

        Raises:
            OptionError: `in_flight` is no count; at its turn, an item in none of the forms.
        """
        from ovshim.serve.ahead import in_order

        return in_order(self._module, items, in_flight)

    def submit(self, *args: Any, **kwargs: Any) -> Future[Any]:
        """Call the module, and have the answer as a future.

        What reaches OpenVINO runs in a thread of a pool, or at once where that is over before
        another thread would have begun; what eager has to answer, in one thread of its own, one
        call after the other. Gradient and inference mode are the caller's. Under
        modes that belong to a thread alone (autocast, a function mode) the call is made at once.
        """
        from ovshim.serve.ahead import submitted

        return submitted(self, self._module, args, kwargs)

    async def acall(self, *args: Any, **kwargs: Any) -> Any:
        """`submit` for asyncio: the answer, while the event loop goes on."""
        import asyncio

        return await asyncio.wrap_future(self.submit(*args, **kwargs))

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write every graph that OpenVINO serves into a new directory, which `ovshim.load` makes a
        module of, without this module's code, on other machines as well.

        In it are the weights, one or more example inputs and eager's answers to them. Plans that
        eager serves stay behind, with a FallbackWarning.

        Raises:
            ArtifactError: there is nothing to save, or the directory cannot be written.
            OptionError: what is given is no path.
        """
        from ovshim.artifact.save import save

        where = path_of("directory", directory)
        dispatcher = self._forward(where)
        if any(plan.cache == "artifact" for plan in dispatcher.plans):
            what = "the module was itself loaded from an artifact."
            raise ArtifactError(str(where), what, "Copy the directory that it was loaded from.")
        save(self._module, self._call, dispatcher.plans, where)

    def export(
        self,
        directory: str | os.PathLike[str],
        layout: Literal["ovms"] = "ovms",
        *,
        name: str | None = None,
    ) -> list[str]:
        """Add every graph that OpenVINO serves to a model repository, for programs other than
        Python. Returns the names of the models in it.

        Args:
            layout: "ovms": OpenVINO Model Server's: config.json, and a directory for each version.
            name: of the model; None: that of the module's class, in lower case.

        Raises:
            ArtifactError: there is nothing to export, or the repository cannot be written.
            OptionError: an unknown layout, a name or a path that is none, a device of several.
        """
        from ovshim.artifact.ovms import LAYOUTS, export

        if layout not in LAYOUTS:
            raise OptionError("layout", layout, f"one of {', '.join(LAYOUTS)}", "Give 'ovms'.")
        where = path_of("directory", directory)
        dispatcher = self._forward(where)
        return export(self._module, self._call, dispatcher.plans, where, self.options, name)

    def _forward(self, where: Path) -> Dispatcher:
        """The dispatcher of `forward`, its plans complete; ArtifactError where others have some."""
        self.wait()
        bound = {name: b.dispatcher for name, b in installed(self._module).items()}
        own = bound.pop("forward", None)
        others = [n for n, d in bound.items() if isinstance(d, Dispatcher) and d.plans]
        if others or not isinstance(own, Dispatcher):
            what = f"of the methods {', '.join(bound)} no graph can be carried away."
            remedy = "Accelerate a module whose forward does that, and save it."
            raise ArtifactError(str(where), what, remedy)
        return own

    @property
    def _call(self) -> Callable[..., Any]:
        """The module's own forward."""
        return installed(self._module)["forward"].original.resolve()  # type: ignore[no-any-return]

    @property
    def _dispatchers(self) -> Sequence[Dispatcher]:
        bound = installed(self._module).values()
        return [b.dispatcher for b in bound if isinstance(b.dispatcher, Dispatcher)]

    @property
    def _encoder(self) -> Handle | None:
        """Of the encoder that `generate()` calls on its own, where it is accelerated."""
        found = encoder_of(self._module)
        handle = None if found is None else found.__dict__.get("ovshim")
        return handle if isinstance(handle, Handle) else None

    @property
    def _all_dispatchers(self) -> Sequence[Dispatcher]:
        encoder = self._encoder
        return [*self._dispatchers, *(() if encoder is None else encoder._dispatchers)]


def report_of(name: str, options: Options, dispatchers: Sequence[Dispatcher]) -> Report:
    """How the methods of one module, of that name, have been served so far."""
    from ovshim.report import Report

    plans = [plan for dispatcher in dispatchers for plan in dispatcher.plans]
    eager: dict[str, int] = {}
    calls = {"openvino": 0, "mixed": 0, "eager": 0}
    for dispatcher in dispatchers:
        calls["openvino"] += dispatcher.tally.served("openvino")
        calls["mixed"] += dispatcher.tally.served("mixed")
        for code, count in dispatcher.tally.eager.items():
            eager[code] = eager.get(code, 0) + count
    calls["eager"] = sum(eager.values())
    return Report(
        module=name,
        device=options.device,
        precision=plans[0].precision if plans else _asked(options),
        calls=calls,
        eager=eager,
        plans=[plan.to_dict() for plan in plans],
    )


def _asked(options: Options) -> str:
    asked = options.precision or "own"
    return asked if isinstance(asked, str) else "rules"
