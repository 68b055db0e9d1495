"""`accelerate` and `explain`: what most users need to know of ovshim."""

from __future__ import annotations

import dataclasses
import functools
import sys
import warnings
from collections.abc import Callable, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar, Unpack, overload

from torch import nn
from torch.nn.parameter import is_lazy

from ovshim import early, garbage
from ovshim.attributes import tensors_of
from ovshim.checks import no_module
from ovshim.errors import FallbackWarning, OptionError
from ovshim.example import FORMS, as_call
from ovshim.hooks import is_loaded
from ovshim.options import (
    OptionFields,
    Options,
    enabled_in_environment,
    for_part,
    quantizes,
    resolve,
)
from ovshim.properties import check_placement
from ovshim.scripted import is_frozen
from ovshim.shapes import check_names
from ovshim.signals import let_through

# The rest is imported by who needs it: a compilation may be under way by then.
if TYPE_CHECKING:
    from ovshim.dispatch import Dispatcher
    from ovshim.job import Job
    from ovshim.plan import Plan
    from ovshim.report import Report

__all__ = ["accelerate", "explain"]

M = TypeVar("M", bound=nn.Module)
C = TypeVar("C", bound=type[nn.Module])


@overload
def accelerate(
    module: M,
    example_input: Any = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    options: Options | None = None,
    **fields: Unpack[OptionFields],
) -> M: ...


@overload
def accelerate(
    *, options: Options | None = None, **fields: Unpack[OptionFields]
) -> Callable[[C], C]: ...


def accelerate(
    module: Any = None,
    example_input: Any = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    options: Options | None = None,
    **fields: Unpack[OptionFields],
) -> Any:
    """Make a module run on OpenVINO.

        fast = ovshim.accelerate(model, example_input)
        with torch.inference_mode():
            y = fast(x)

    The result is of the module's own class and has its parameters; `fast.ovshim` is the one name
    added. Calls that OpenVINO cannot serve rightly are served by the module's own method;
    `print(ovshim.explain(fast))` tells which and why.

    Args:
        module: an `nn.Module` in evaluation mode. Left out, the result decorates a class: each
            instance of it accelerates itself at its first call.
        example_input: the arguments of a call: a tensor (one positional argument), a tuple
            (positional arguments) or a mapping (keyword arguments). Left out, the first call is
            the example.
        example_kwargs: keyword arguments beside an `example_input` that is a tensor or a tuple.
        options, fields: see `ovshim.Options`; fields win.

    Returns:
        A twin of the module over the same tensors; the module itself with `inplace=True`.

    Raises:
        OptionError: a value that cannot be right; a module that is not initialised yet (a lazy
            one), or that cannot be copied without `inplace=True`.
        FallbackError: `strict=True`, and eager would have to serve the example. (With
            `background=True` the next such call raises it.)
    """
    chosen = resolve(options, dict(fields))
    has_example = example_input is not None or example_kwargs is not None
    if module is None:
        if has_example:
            raise OptionError(
                "module", None, "an nn.Module", "Give the module before its example input."
            )
        return _decorator(chosen)
    _check_module(module, chosen)
    if enabled_in_environment():
        check_placement(chosen)
    if not has_example:
        return _equipped(module, chosen)
    if chosen.inplace:
        _check_initialised(module)
    call = as_call(example_input, example_kwargs)
    ahead = _begun(module, chosen, call)
    fast = _equipped(module, chosen)
    _prepare(fast, chosen, call, ahead)
    return fast


def _begun(
    module: nn.Module, options: Options, call: tuple[tuple[Any, ...], dict[str, Any]]
) -> early.Ahead | None:
    """What can be begun of a plan, where one is going to be made here and now."""
    idle = options.background or options.prefer == "eager" or module.training
    return None if idle or not enabled_in_environment() else early.begin_for(module, options, *call)


def _equipped(module: nn.Module, options: Options) -> nn.Module:
    """The module, or a twin of it, with our callables in front of its methods."""
    from ovshim.twin import make_twin

    fast = module if options.inplace else make_twin(module)
    garbage.note(fast, _bytes_of(module))
    _equip(fast, options)
    return fast


def _bytes_of(module: nn.Module) -> int:
    try:
        held = (tensor for _, tensor in chain(*tensors_of(module)) if not is_lazy(tensor))
        return sum(tensor.numel() * tensor.element_size() for tensor in held)
    except Exception as error:  # of what cannot be gone through eager will serve the calls
        let_through(error)
        return 0


def _prepare(
    fast: nn.Module,
    options: Options,
    call: tuple[tuple[Any, ...], dict[str, Any]],
    ahead: early.Ahead | None,
) -> None:
    """Make the plan for an example, which is one of the first method's."""
    from ovshim.bound import installed

    dispatcher: Any = installed(fast)[options.methods[0]].dispatcher
    dispatcher.prepare(*call, wait=not options.background, ahead=ahead)


def explain(
    module: nn.Module,
    example_input: Any = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    options: Options | None = None,
    **fields: Unpack[OptionFields],
) -> Report:
    """How an accelerated module is served; or, for a plain module with an example, how it would be.

    The latter is a dry run: the same build, nothing cached, the module untouched.

    Args:
        options, fields: of the dry run; see `ovshim.Options`, fields win.

    Raises:
        OptionError: a plain module without an example, options for a module that is accelerated,
            or a value that cannot be right.
    """
    if not isinstance(module, nn.Module):
        raise no_module(module)
    from ovshim.handle import Handle

    chosen = resolve(options, dict(fields))
    handle = module.__dict__.get("ovshim")
    if isinstance(handle, Handle):
        given: dict[str, Any] = {**fields} if options is None else {"options": options, **fields}
        for name, value in given.items():
            remedy = "Leave it out, or give the plain module and an example for a dry run."
            raise OptionError(name, value, "nothing for a module that is accelerated", remedy)
        return handle.report()
    if example_input is None and example_kwargs is None:
        raise OptionError(
            "example_input", None, FORMS, "Give an example of a call of this plain module."
        )
    chosen = dataclasses.replace(
        chosen,
        inplace=False,
        memory="shared",
        cache_dir=False,
        strict=False,
        background=False,
    )
    with warnings.catch_warnings():
        # Nothing runs in eager yet: the report itself is what there is to say.
        warnings.simplefilter("ignore", FallbackWarning)
        fast = accelerate(module, example_input, example_kwargs=example_kwargs, options=chosen)
    return fast.ovshim.report()  # type: ignore[no-any-return, operator, union-attr]


def _check_module(module: Any, options: Options) -> None:
    if isinstance(module, type) and issubclass(module, nn.Module):
        remedy = "Give an instance; to decorate the class write brackets: @ovshim.accelerate()."
        raise OptionError("module", module, "an instance of torch.nn.Module", remedy)
    if not isinstance(module, nn.Module):
        raise no_module(module)
    if is_frozen(module):
        allowed = "a module that torch.jit.freeze has not made"
        remedy = "Accelerate the module that was scripted, or one that holds it."
        raise OptionError("module", type(module).__qualname__, allowed, remedy)
    if is_loaded(module):
        remedy = "It runs in OpenVINO already: call it as it is."
        raise OptionError("module", type(module).__qualname__, "a module that has code", remedy)
    if _is_compiled(module):
        remedy = "Accelerate the module first, or compile it by torch.compile(backend='ovshim')."
        allowed = "a module that torch.compile has not wrapped"
        raise OptionError("module", type(module).__qualname__, allowed, remedy)
    for name in options.methods:
        if not callable(getattr(module, name, None)):
            raise OptionError(
                "methods",
                options.methods,
                f"names of methods of {type(module).__qualname__}",
                f"It has no method {name!r}.",
            )
    check_names(options, getattr(module, options.methods[0]))
    _check_precision(module, options)


def _is_compiled(module: nn.Module) -> bool:
    """Whether it is what `torch.compile` gives of a module: of its code nothing can be captured."""
    # Where nobody has compiled, this need not be imported for that.
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    return dynamo is not None and isinstance(module, dynamo.OptimizedModule)


def _check_initialised(module: nn.Module) -> None:
    """Raise OptionError for a lazy module that has not run, before anything is put on it. Without
    an example its first call is the example, and finds it initialised."""
    from ovshim.twin import check_initialised

    for one in module.modules():
        check_initialised(one)


def _check_precision(module: nn.Module, options: Options) -> None:
    """Raise OptionError for rules that fit nothing, and where NNCF is needed and missing."""
    asked = options.precision
    if isinstance(asked, Mapping):
        from ovshim.precision import rules

        rules.check(asked, module)
    if quantizes(options):
        from ovshim.precision import quantize

        quantize.require(asked)


class Maker:
    """Makes the dispatcher of a method: what a `BoundMethod` carries along, in copies and pickles,
    so that each module gets a dispatcher of its own.

    Args:
        along: whether nobody has asked for this module, but for the one that generates with it.
    """

    along = False  # in pickles of before it is missing

    def __init__(self, method: str, options: Options, along: bool = False) -> None:
        self.method = method
        self.options = options
        self.along = along

    def __getstate__(self) -> dict[str, Any]:
        # Loaders with workers and functions defined on the spot do not pickle; their items do.
        return {**vars(self), "options": self.options.portable()}

    def __call__(self, module: nn.Module, original: Callable[..., Any]) -> Dispatcher:
        from ovshim.dispatch import Dispatcher

        return Dispatcher(module, self.method, original, self.options, _divided, may_wait=True)


def _divided(job: Job, plan: Plan) -> Plan:
    # Imported where a module is divided, which few are.
    from ovshim.parts import divide

    return divide(job, plan)


def _equip(module: nn.Module, options: Options, along: bool = False) -> None:
    """Put our callables in front of a module's methods. Its encoder, where it generates with one,
    is a module of its own to `generate()`, and accelerated as one.

    Args:
        along: as in `Maker`.
    """
    from ovshim.bound import install
    from ovshim.decode import encoder_of
    from ovshim.handle import Handle

    for name in options.methods:
        install(module, name, Maker(name, options, along))
    # Not setattr: a module of the user's may have a __setattr__ of its own.
    module.__dict__["ovshim"] = Handle(module, options)
    encoder = encoder_of(module) if "forward" in options.methods else None
    if encoder is not None and _is_left_to_us(encoder):
        _unequip(encoder)  # of what its model was accelerated with before
        of_encoder = for_part(options)
        if of_encoder is not None:
            _equip(encoder, of_encoder, along=True)


def _is_left_to_us(encoder: nn.Module) -> bool:
    """Whether nobody has accelerated it by itself."""
    from ovshim.bound import installed

    makers = [bound.make for bound in installed(encoder).values()]
    return all(isinstance(make, Maker) and make.along for make in makers)


def _unequip(module: nn.Module) -> None:
    from ovshim.bound import installed, uninstall

    for name in installed(module):
        uninstall(module, name)
        module.__dict__.pop("ovshim", None)


def _decorator(options: Options) -> Callable[[C], C]:
    """Accelerates instances in place, each when its constructor has finished."""

    def decorate(cls: C) -> C:
        given: Any = cls
        if not (isinstance(given, type) and issubclass(given, nn.Module)):
            raise OptionError(
                "module", cls, "a class derived from torch.nn.Module", "Decorate the class."
            )
        inherited = cls.__init__

        @functools.wraps(inherited)
        def construct(self: nn.Module, *args: Any, **kwargs: Any) -> None:
            inherited(self, *args, **kwargs)
            if type(self) is cls:  # a subclass is not finished here, and was not decorated
                _check_module(self, options)
                _equip(self, options)

        cls.__init__ = construct  # type: ignore[method-assign]
        return cls

    return decorate
