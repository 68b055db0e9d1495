"""`fast.ovshim`: the one name of ours on an accelerated module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from ovshim.bound import installed
from ovshim.dispatch import Dispatcher
from ovshim.example import as_call
from ovshim.options import Options
from ovshim.report import Report

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Handle"]


class Handle:
    """What can be asked of an accelerated module, and told it.

    It knows nothing but the module: copies and unpickled modules get their own.
    """

    _ovshim_transparent = True

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def renewed(self, module: nn.Module) -> Handle:
        """A handle of the same sort for a copy of the module."""
        return Handle(module)

    @property
    def options(self) -> Options:
        """The options that the module was accelerated with."""
        return self._dispatchers[0].options

    def report(self) -> Report:
        """How the module has been served so far; `ovshim.explain(fast)` is the same."""
        dispatchers = self._dispatchers
        plans = [plan for dispatcher in dispatchers for plan in dispatcher.plans]
        eager: dict[str, int] = {}
        calls = {"openvino": 0, "mixed": 0, "eager": 0}
        for dispatcher in dispatchers:
            calls["openvino"] += dispatcher.openvino_calls
            calls["mixed"] += dispatcher.mixed_calls
            for code, count in dispatcher.eager_calls.items():
                eager[code] = eager.get(code, 0) + count
        calls["eager"] = sum(eager.values())
        return Report(
            module=type(self._module).__qualname__,
            device=self.options.device,
            precision=plans[0].precision if plans else self.options.precision or "own",
            calls=calls,
            eager=eager,
            plans=[plan.to_dict() for plan in plans],
        )

    def stats(self) -> dict[str, int]:
        """Number of calls by path."""
        return dict(self.report().calls)

    def reset_stats(self) -> None:
        """Set every counter of calls back to 0."""
        for dispatcher in self._dispatchers:
            dispatcher.reset_counters()

    def refresh(self) -> None:
        """Drop every plan and build anew at the next call.

        Needed after a write that torch does not count: through `.data`, a NumPy view, or an
        optimizer with `fused=True`.
        """
        for dispatcher in self._dispatchers:
            dispatcher.refresh()

    def warm(self, *examples: Any) -> None:
        """Make the plans for these examples now (each in the forms of `example_input`).

        Raises OptionError for an example that the module itself refuses.
        """
        for example in examples:
            for dispatcher in self._dispatchers:
                dispatcher.prepare(*as_call(example, None))

    @property
    def _dispatchers(self) -> Sequence[Dispatcher]:
        bound = installed(self._module).values()
        return [b.dispatcher for b in bound if isinstance(b.dispatcher, Dispatcher)]
