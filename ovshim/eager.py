"""Eager as the measure: what the module itself answers, and how far a candidate is from it."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from ovshim.signature import Kind, Structure, TensorLeaf, flatten, unflatten_call
from ovshim.verify import Mismatch, compare, compare_views, relative_errors, sample_error
from ovshim.views import Views

__all__ = ["LOW_TOLERANCE", "Answer", "Candidate", "Eager"]

log = logging.getLogger("ovshim")

# A module in bf16 or fp16 is compared with its fp32 upcast, and may be this much further from it
# than eager in its own dtype is.
_OWN_DTYPE_MARGIN = 1.5
# Where a module in bf16 or fp16 has no upcast that runs: the options' default for those.
LOW_TOLERANCE = 0.03


@dataclasses.dataclass(frozen=True)
class Answer:
    """Eager's output, flattened, beside the fp32 upcast's where precision calls for one."""

    leaves: list[Any]
    structure: Structure
    exact: list[Any] | None


class Candidate(Protocol):
    """What is to answer as eager does.

    Attributes:
        checked: whether it finds out by itself that an index lies outside of its table.
    """

    @property
    def checked(self) -> bool: ...

    def answer(self, given: Sequence[torch.Tensor], /) -> Any:
        """Its output for these tensors of a call."""


class Eager:
    """Asks the module itself, and judges a candidate's answer by it.

    Args:
        tolerance: largest relative L2 error; None for a module in bf16 or fp16 that runs in its
            own precision: then the fp32 upcast of the module is the measure.
        views: which leaves of the output candidates take of others; None: as eager does, for what
            runs in parts.
    """

    def __init__(
        self,
        module: nn.Module,
        method: str,
        call: Callable[..., Any],
        kind: Kind,
        leaves: Sequence[Any],
        tolerance: float | None,
        views: Views | None = None,
    ) -> None:
        self.call = call
        self.kind = kind
        self.leaves = leaves
        self.tolerance = tolerance
        self.views = views
        self._upcast: Callable[..., Any] | None = None
        if tolerance is None:
            exact = copy.deepcopy(module).float()
            self._upcast = getattr(type(exact), method).__get__(exact)

    def answer(self, tensors: Sequence[torch.Tensor]) -> Answer:
        """Eager's output for these tensors. Raises what the module raises."""
        leaves, structure = flatten(self._run(self.call, tensors))
        return Answer(leaves, structure, self.exact(tensors))

    def answer_or_none(self, tensors: Sequence[torch.Tensor]) -> Answer | None:
        """The same; None where the module raises at values that it does not take."""
        try:
            return self.answer(tensors)
        except Exception as error:  # whatever a user's module raises
            log.debug("eager refuses redrawn values: %s", error)
            return None

    def exact(self, tensors: Sequence[torch.Tensor]) -> list[Any] | None:
        """The fp32 upcast's output, where it is the measure."""
        if self._upcast is None:
            return None
        floats = {torch.bfloat16, torch.float16}
        upcast = {id(t): t.float() if t.dtype in floats else t for t in tensors}
        try:
            return flatten(self._run(self._upcast, [upcast[id(t)] for t in tensors]))[0]
        except Exception as error:  # a module of several dtypes may not run in one
            log.debug("the fp32 upcast does not run: %s", error)
            return None

    def judge(self, answer: Answer, candidate: Any) -> float:
        """The candidate's largest error.

        Raises:
            Mismatch: it is not what eager answers.
        """
        if self.views is not None:
            compare_views(answer.leaves, self.views)
        if answer.exact is None or self.tolerance is not None:
            allowed = LOW_TOLERANCE if self.tolerance is None else self.tolerance
            return compare(answer.leaves, answer.structure, candidate, allowed)
        # Alike in structure, dtype, shape and NaNs; how far off is a matter of the upcast.
        compare(answer.leaves, answer.structure, candidate, float("inf"))
        mine = relative_errors(answer.exact, answer.leaves)
        others = relative_errors(answer.exact, flatten(candidate)[0])
        for i, (own, other) in enumerate(zip(mine, others, strict=True)):
            if not other <= _OWN_DTYPE_MARGIN * own + 1e-6:
                raise Mismatch(f"output {i} is off by {other:.2g} from fp32, eager by {own:.2g}")
        return max(others, default=0.0)

    def judge_samples(self, pairs: Sequence[tuple[Sequence[Any], Sequence[Any]]]) -> float:
        """The largest error of the candidate's answers to several calls (see `sample_error`), given
        as pairs of flattened outputs, eager's first.

        Raises:
            Mismatch: it is too large.
        """
        allowed = LOW_TOLERANCE if self.tolerance is None else self.tolerance
        error = sample_error(pairs)
        if not error <= allowed:
            raise Mismatch(f"an output is off by {error:.2g} (allowed: {allowed:.2g})")
        return error

    def _run(self, call: Callable[..., Any], tensors: Sequence[torch.Tensor]) -> Any:
        given = iter(tensors)
        leaves = [
            next(given) if isinstance(leaf, TensorLeaf) else constant
            for leaf, constant in zip(self.kind.leaves, self.leaves, strict=True)
        ]
        args, kwargs = unflatten_call(self.kind.requiring(leaves), self.kind.structure)
        return call(*args, **kwargs)
