"""One walk over everything that a module's answer depends on, parameters and buffers aside.

The walk writes a canonical text and hashes it. Objects get a number when first met and are
described once, in the order in which they were met; names of modules, files and lines never
enter, so neither the process nor the directory of the code does.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.modules.module as torch_module
import xxhash
from torch import nn

from ovshim.fingerprint import bytecode, weights
from ovshim.fingerprint.bytecode import facts
from ovshim.fingerprint.errors import Unkeyable
from ovshim.fingerprint.reach import Reach
from ovshim.fingerprint.trail import Trail
from ovshim.fingerprint.values import rank, text

# What nn.Module keeps for itself. The hooks that run in a forward are written separately; those
# of backward and of state dicts, and what is persistent, change no answer.
_MODULES_OWN = frozenset({
    "training", "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set",
    "_backward_pre_hooks", "_backward_hooks", "_is_full_backward_hook", "_forward_hooks",
    "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_state_dict_hooks", "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks", "_compiled_call_impl",
})  # fmt: skip
# Weak references, and the parameters again.
_RNN_OWN = frozenset({"_flat_weights", "_flat_weight_refs"})
# The graph from which `forward` was generated, and what made it; `forward` itself is read.
_GRAPH_OWN = frozenset({
    "_graph", "_code", "_tracer_cls", "_tracer_extras", "_lineno_map", "_prologue_start", "meta",
    "_replace_hooks", "_create_node_hooks", "_erase_node_hooks", "_deepcopy_hooks", "shape_env",
    "_graphmodule_cls_name",
})  # fmt: skip

_NAMED = (type, types.FunctionType)

T = TypeVar("T")


def code(module: nn.Module, method: str) -> str:
    """32 hex digits for all that `module.method` computes by, but for parameters and buffers.

    Raises `Unkeyable`.
    """
    return _walked(_Walk(module, method), _Walk.digest)


def trail(module: nn.Module, method: str) -> Trail:
    """Where each piece of that came from. Raises `Unkeyable`."""
    return _walked(_Walk(module, method), _Walk.trail)


def _walked(walk: _Walk, way: Callable[[_Walk], T]) -> T:
    try:
        return way(walk)
    except Unkeyable:
        raise
    except Exception as error:  # of any object's own making, or too deep, or changed meanwhile
        what = f"something that cannot be read ({type(error).__name__}: {error})"
        raise Unkeyable(walk.where, what) from error


class _Walk(Reach):
    def __init__(self, root: nn.Module, method: str) -> None:
        named, modules = (*root.named_parameters(), *root.named_buffers()), list(root.modules())
        super().__init__(
            known={id(tensor): name for name, tensor in named},
            made={base for m in modules for base in type(m).__mro__},
        )
        self.root = root
        self.own = [tensor for _, tensor in named]
        self.method = method
        self.tree = {id(m) for m in modules}

    def digest(self) -> str:
        tensors = self.text()
        return xxhash.xxh3_128_hexdigest(b"".join([*self.out, *tensors]))

    def text(self) -> list[bytes]:
        """Writes all of it; gives the digests of the tensors in it, which belong behind."""
        versions = (sys.version_info[:3], torch.__version__, np.__version__)
        state = (
            torch.get_default_dtype(),
            torch.get_default_device(),
            torch.get_deterministic_debug_mode(),
        )
        self.mark(where="torch")
        self.out.append(text(f"{versions} {state} {self.method}"))
        self.learn(("__call__", "forward", self.method))
        self.hooks(torch_module._global_forward_pre_hooks, torch_module._global_forward_hooks)
        for space in (torch, nn.functional):
            self.module_patches(space)
        self.cls(torch.Tensor, referenced=False)
        self.mark()
        self.value(self.root)
        for tensor in self.own:
            self.attached(tensor)
        self.run()
        self.read()
        iterated = self.iterated({attribute for attribute, _ in self.orders})
        for attribute, order in self.orders:
            if attribute in iterated:
                self.mark("the order of ", attribute, "")
                self.out += [text(attribute), *(rank(key) or b"?" for key in order)]
        return weights.digests(self.tensors)

    def read(self) -> None:
        """Writes what the code, all of which has been seen, reads of tensors besides values."""
        for tensor in (*self.own, *self.tensors):
            for one in weights.read(tensor, self.names):
                self.mark("what is read of ", self.known.get(id(tensor), "a tensor"), "")
                self.value(one)
        self.run()

    def trail(self) -> Trail:
        self.marks = []
        tensors = self.text()
        named: list[Any] = [v if type(v) in _NAMED else type(v) for v in self.kept]
        return Trail(self.out, self.marks, [one.__qualname__ for one in named], tensors)

    def iterated(self, attributes: set[str]) -> set[str]:
        """Those that the code which was followed iterates over. Only what mentions one is read
        for it: statements are taken apart slowly."""
        found: set[str] = set()
        for followed in self.followed:
            mentioned = attributes.intersection(facts(followed).names)
            if not mentioned <= found:
                found |= mentioned & bytecode.iterated(followed)
        return found

    def module(self, module: nn.Module) -> None:
        self.library = False
        kind = type(module)
        if isinstance(module, torch.jit.ScriptModule):
            raise Unkeyable(self.where, "a TorchScript module")
        self.cls(kind, referenced=False)
        self.out += [b"module", b"train" if module.training else b"eval"]
        for tensors in (module._parameters, module._buffers):
            for name, tensor in sorted(tensors.items()):
                self.out += [text(name), b"None" if tensor is None else b"tensor"]
                if tensor is not None and id(module) not in self.tree:
                    self.value(tensor)
        self.hooks(module._forward_pre_hooks, module._forward_hooks,
                   module._forward_pre_hooks_with_kwargs, module._forward_hooks_with_kwargs,
                   module._forward_hooks_always_called)  # fmt: skip
        skipped = _MODULES_OWN | self.skipped(kind)
        if isinstance(module, nn.RNNBase):
            skipped |= _RNN_OWN
        elif isinstance(module, torch.fx.GraphModule):
            skipped |= _GRAPH_OWN
        self.attributes(vars(module), skipped)
        where = self.where
        for name, child in module._modules.items():  # in order: containers run in it
            self.where = f"{where}.{name}" if where else name
            self.mark()
            self.out.append(text(name))
            self.value(child)
        self.where = where
        self.mark()

    def hooks(self, *tables: dict[int, Any]) -> None:
        """Hooks in the order in which they run, with their flags; their ids count up for ever."""
        for table in tables[:2]:
            self.mark(" hooks")
            self.out.append(b"hooks%d" % len(table))
            for key, hook in table.items():
                self.out += [b"+" if key in flags else b"-" for flags in tables[2:]]
                self.value(hook)
