"""Losses, which models compute in inference too where they are given labels, made of operators that
OpenVINO has."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ovshim.capture.rewrites import exponentials
from ovshim.capture.rewrites.entry import Function, Rewrite, argument, tensor_of

__all__ = ["TABLE"]


def _reduced(loss: torch.Tensor, reduction: str) -> torch.Tensor:
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


# --- between numbers --------------------------------------------------------------------------


def mse_loss(x: torch.Tensor, target: torch.Tensor, *, reduction: str = "mean") -> torch.Tensor:
    return _reduced((x - target) ** 2, reduction)


def l1_loss(x: torch.Tensor, target: torch.Tensor, *, reduction: str = "mean") -> torch.Tensor:
    return _reduced((x - target).abs(), reduction)


def smooth_l1_loss(
    x: torch.Tensor, target: torch.Tensor, *, reduction: str = "mean", beta: float = 1.0
) -> torch.Tensor:
    far = (x - target).abs()
    if beta == 0:
        return _reduced(far, reduction)
    return _reduced(torch.where(far < beta, 0.5 * far * far / beta, far - 0.5 * beta), reduction)


def huber_loss(
    x: torch.Tensor, target: torch.Tensor, *, reduction: str = "mean", delta: float = 1.0
) -> torch.Tensor:
    far = (x - target).abs()
    near = 0.5 * far * far
    return _reduced(torch.where(far <= delta, near, delta * (far - 0.5 * delta)), reduction)


def soft_margin_loss(
    x: torch.Tensor, target: torch.Tensor, *, reduction: str = "mean"
) -> torch.Tensor:
    return _reduced(exponentials.log1p(torch.exp(-target * x).abs()), reduction)


def kl_div(
    x: torch.Tensor, target: torch.Tensor, *, reduction: str = "mean", log_target: bool = False
) -> torch.Tensor:
    if log_target:
        loss = torch.exp(target) * (target - x)
    else:
        nothing = torch.zeros_like(target)
        loss = torch.where(target == 0, nothing, target * torch.log(target)) - target * x
    if reduction == "batchmean":
        return loss.sum() / x.shape[0]
    return _reduced(loss, reduction)


def binary_cross_entropy_with_logits(
    x: torch.Tensor,
    target: torch.Tensor,
    *,
    weight: torch.Tensor | None = None,
    reduction: str = "mean",
    pos_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    unlikely = exponentials.softplus(-x)
    if pos_weight is not None:
        unlikely = (1 + (pos_weight - 1) * target) * unlikely
    loss = (1 - target) * x + unlikely
    return _reduced(loss if weight is None else loss * weight, reduction)


_LEGACY = ("size_average", "reduce")
# The names of further arguments, in eager's order.
_ARGUMENTS: dict[Function, tuple[str, ...]] = {
    mse_loss: (*_LEGACY, "reduction", "weight"),
    l1_loss: (*_LEGACY, "reduction", "weight"),
    smooth_l1_loss: (*_LEGACY, "reduction", "beta"),
    huber_loss: ("reduction", "delta", "weight"),
    soft_margin_loss: (*_LEGACY, "reduction"),
    kl_div: (*_LEGACY, "reduction", "log_target"),
    binary_cross_entropy_with_logits: ("weight", *_LEGACY, "reduction", "pos_weight"),
}
_OF_ANY_SIZES = (binary_cross_entropy_with_logits,)


def _between_numbers(function: Function) -> Any:
    def choose(node: Node) -> Function | None:
        pair = [argument(node, 0, "input"), argument(node, 1, "target")]
        fakes = [tensor_of(x) for x in pair]
        if any(fake is None or not fake.dtype.is_floating_point for fake in fakes):
            return None
        x, target = fakes
        # Of other sizes eager warns, each time, before it broadcasts them.
        if str(x.shape) != str(target.shape):  # type: ignore[union-attr]
            return None
        names = _ARGUMENTS[function]
        given = dict(zip(names, node.args[2:], strict=False)) | dict(node.kwargs)
        known: dict[str, Any] = {
            k: v for k, v in given.items() if v is not None and k not in ("input", "target")
        }
        if known.keys() & {*_LEGACY} or ("weight" in known and function not in _OF_ANY_SIZES):
            return None
        node.args = tuple(pair)
        node.kwargs = known
        return function

    return choose


# --- between classes --------------------------------------------------------------------------


def log_probabilities(x: torch.Tensor) -> torch.Tensor:
    return F.log_softmax(x, _classes(x))


def rows_of_classes(target: torch.Tensor, dim: int, ignore_index: int) -> torch.Tensor:
    """Where to look up what a target's class has; of those to be ignored, the first."""
    kept = torch.where(target == ignore_index, torch.zeros_like(target), target)
    return kept.unsqueeze(dim)


def of_classes(
    picked: torch.Tensor,
    target: torch.Tensor,
    weights: torch.Tensor | None,
    ignore_index: int,
    reduction: str,
) -> torch.Tensor:
    """The loss of the log probabilities of a target's classes, and the weights of these."""
    counts = (target != ignore_index).to(picked.dtype)
    loss = -picked.reshape(target.shape)
    if weights is not None:
        counts = counts * weights.reshape(target.shape)
    # Not as a product: what is ignored may be infinite.
    loss = torch.where(target == ignore_index, torch.zeros_like(loss), loss)
    if weights is not None:
        loss = loss * weights.reshape(target.shape)
    if reduction == "mean":
        return loss.sum() / counts.sum()
    return _reduced(loss, reduction)


def of_probabilities(x: torch.Tensor, target: torch.Tensor, reduction: str) -> torch.Tensor:
    dim = _classes(x)
    loss = -(target * F.log_softmax(x, dim)).sum(dim)
    return _reduced(loss, reduction)


def _classes(x: torch.Tensor) -> int:
    return 0 if x.dim() == 1 else 1


def _cross_entropy(node: Node) -> Function | None:
    names = ("weight", "size_average", "ignore_index", "reduce", "reduction", "label_smoothing")
    return _by_class(node, names, from_scores=True)


def _nll(node: Node) -> Function | None:
    names = ("weight", "size_average", "ignore_index", "reduce", "reduction")
    return _by_class(node, names, from_scores=False)


def _by_class(node: Node, names: tuple[str, ...], from_scores: bool) -> Function | None:
    """The look-up of the classes is put into the graph as such: it is looked at there whether they
    are in range."""
    x, target = argument(node, 0, "input"), argument(node, 1, "target")
    scores, classes = tensor_of(x), tensor_of(target)
    given = dict(zip(names, node.args[2:], strict=False)) | dict(node.kwargs)
    known = {k: v for k, v in given.items() if v is not None}
    if scores is None or classes is None or not scores.dtype.is_floating_point:
        return None
    if known.keys() & {*_LEGACY} or known.get("label_smoothing"):
        return None
    reduction, weight = known.get("reduction", "mean"), known.get("weight")
    if classes.dtype.is_floating_point:
        if not from_scores or weight is not None or classes.dim() != scores.dim():
            return None
        node.args, node.kwargs = (x, target, reduction), {}
        return of_probabilities
    dim, ignored = _classes(scores), known.get("ignore_index", -100)
    if classes.dtype is not torch.int64 or not _of_one_size(scores, classes, dim):
        return None
    rows = _before(node, rows_of_classes, (target, dim, ignored), classes.unsqueeze(dim))
    if from_scores:
        x = _before(node, log_probabilities, (x,), scores)
    picked = _before(node, torch.gather, (x, dim, rows), scores.narrow(dim, 0, 1))
    weights = None
    if weight is not None:
        flat = _before(node, torch.flatten, (rows,), classes.flatten())
        of_each = classes.flatten().to(scores.dtype)
        weights = _before(node, torch.index_select, (weight, 0, flat), of_each)
    node.args, node.kwargs = (picked, target, weights, ignored, reduction), {}
    return of_classes


def _of_one_size(scores: torch.Tensor, classes: torch.Tensor, dim: int) -> bool:
    """Whether there is a class for every row of scores: `gather` reads elsewhere where not."""
    if classes.dim() != scores.dim() - 1:
        return False
    others = [size for d, size in enumerate(scores.shape) if d != dim]
    return all(statically_known_true(a == b) for a, b in zip(others, classes.shape, strict=True))


def _before(node: Node, function: Function, args: tuple[Any, ...], fake: torch.Tensor) -> Node:
    with node.graph.inserting_before(node):
        made = node.graph.call_function(function, args)
    made.meta = dict(node.meta) | {"example_value": fake}
    return made


_NONE = "has no counterpart"

TABLE = (
    *(Rewrite((getattr(F, f.__name__),), _between_numbers(f), _NONE) for f in _ARGUMENTS),
    Rewrite((F.cross_entropy,), _cross_entropy, _NONE),
    Rewrite((F.nll_loss,), _nll, _NONE),
)
