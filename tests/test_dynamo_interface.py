"""torch's private interfaces, as `ovshim/capture` uses them: a test fails when one of them moves.

Names, parameters and attributes only; what they do is tested by what ovshim does with them. Read
`dynamo.py`, `spared.py`, `sources.py`, `sizes.py` and `rewrites/sizes.py` of ovshim/capture beside
this.
"""

import concurrent.futures
import dataclasses
import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.config
import torch._dynamo.exc
import torch._dynamo.source
import torch.fx.experimental._config
import torch.fx.experimental.symbolic_shapes
import torch.utils._sympy.printers
from torch import nn
from torch._dynamo import convert_frame, decorators
from torch._dynamo.utils import get_metrics_context
from torch._subclasses.meta_utils import MetaTensorDescriber

import ovshim
from ovshim.capture import dynamo, refusals
from ovshim.capture.spared import spared


class Captured(nn.Module):
    """Reads an attribute, a buffer and a size."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("scale", torch.ones(4))
        self.k = 3.0

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"made": self.linear(x * self.scale) * self.k + x.shape[0] + min(x.shape[0], 3) - y}


@dataclasses.dataclass
class Capture:
    module: Captured
    args: tuple[torch.Tensor, torch.Tensor]
    output: Any

    @property
    def graph(self) -> torch.fx.GraphModule:
        made: torch.fx.GraphModule = self.output.backend_input.graph_module
        return made

    @property
    def common(self) -> Any:
        return self.output.graph_capture_output.output_graph


@pytest.fixture(scope="module")
def capture() -> Capture:
    module = Captured().eval().requires_grad_(False)
    args = torch.ones(5, 4), torch.ones(5, 4)
    for arg in args:
        decorators.maybe_mark_dynamic(arg, 0)
    with dynamo._configured():
        output = convert_frame.fullgraph_capture(module.forward, args, {})
    return Capture(module, args, output)


def test_fullgraph_capture_takes_a_bound_method_its_arguments_and_its_keywords() -> None:
    parameters = list(inspect.signature(convert_frame.fullgraph_capture).parameters.values())
    plain = inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert [p.kind for p in parameters[:3]] == [plain] * 3
    assert all(p.default is not p.empty for p in parameters[3:])


def test_a_capture_has_a_graph_and_the_module_is_not_run(capture: Capture) -> None:
    assert isinstance(capture.graph, torch.fx.GraphModule)
    targets = [node.target for node in capture.graph.graph.nodes if node.op == "call_function"]
    assert nn.functional.linear in targets or torch._C._nn.linear in targets
    assert torch.sym_min in targets


def test_nodes_know_their_values_their_modules_and_their_lines(capture: Capture) -> None:
    nodes = [n for n in capture.graph.graph.nodes if n.op == "call_function"]
    for node in nodes:
        assert isinstance(node.meta["example_value"], (torch.Tensor, torch.SymInt)), node
    of_linear = next(node for node in nodes if "linear" in str(node.target))
    assert list(of_linear.meta["nn_module_stack"].values())[-1][0].endswith("linear")
    assert "return {" in (of_linear.stack_trace or "")


def test_placeholders_have_sources_and_fakes_count_their_versions(capture: Capture) -> None:
    placeholders = [n for n in capture.graph.graph.nodes if n.op == "placeholder"]
    fakes = [n for n in placeholders if isinstance(n.meta["example_value"], torch.Tensor)]
    assert len(fakes) == 5
    for node in fakes:
        assert isinstance(node._dynamo_source, torch._dynamo.source.Source)  # type: ignore[attr-defined]
        assert isinstance(node._dynamo_source.name, str)  # type: ignore[attr-defined]
        assert node.meta["example_value"]._version == 0
    assert any(isinstance(n.meta["example_value"], torch.SymInt) for n in placeholders)


def test_a_capture_can_be_replayed(capture: Capture) -> None:
    made = capture.output.graph_capture_output
    assert isinstance(made.import_sources, dict)
    assert isinstance(made.f_globals, dict)
    assert Captured.forward.__code__.co_qualname in {c.co_qualname for c in made.traced_code}
    run = capture.output.forward_callable(
        compiled_fn=capture.graph, extra_globals=dict(made.f_globals)
    )
    actual = run(capture.module, *capture.args)
    torch.testing.assert_close(actual, capture.module(*capture.args))


def test_the_shape_environment_is_open_to_reading(capture: Capture) -> None:
    import sympy

    env = capture.common.shape_env
    symbols = [s for s, sources in env.var_to_sources.items() if sources]
    assert symbols
    for symbol in symbols:
        assert isinstance(env.replace(symbol), sympy.Expr)
        known = env.var_to_range[env.replace(symbol)]
        assert known.lower.is_Integer
        assert known.upper is not None
    assert not env.deferred_runtime_asserts
    assert all(isinstance(guard.expr, sympy.Basic) for guard in env.guards)
    printer = torch.utils._sympy.printers.PythonPrinter()
    assert eval(printer.doprint(symbols[0] + 1), {str(symbols[0]): 6}) == 7


def test_sizes_have_sources_that_name_tensor_and_dimension(capture: Capture) -> None:
    kinds = torch._dynamo.source
    found = [
        source
        for sources in capture.common.shape_env.var_to_sources.values()
        for source in sources
        if isinstance(source, kinds.TensorPropertySource)
        and source.prop is kinds.TensorProperty.SIZE
    ]
    assert {source.idx for source in found} == {0}
    assert {source.base.local_name for source in found} == {"x", "y"}


def test_guards_tell_their_kind_and_their_source(capture: Capture) -> None:
    found = {guard.create_fn_name(): guard for guard in capture.common.guards}
    # The kinds that `sources` reads are names of methods of Dynamo's builder of guards.
    assert {"CONSTANT_MATCH", "EQUALS_MATCH"} & found.keys()
    for guard in capture.common.guards:
        assert isinstance(guard.originating_source, torch._dynamo.source.Source)
        assert isinstance(guard.name, str)


@pytest.mark.parametrize(
    "kind",
    [
        *("EQUALS_MATCH", "CONSTANT_MATCH", "SEQUENCE_LENGTH", "DICT_KEYS_MATCH", "DICT_CONTAINS"),
        *("DICT_NOT_CONTAINS", "SET_CONTAINS", "SET_NOT_CONTAINS", "ID_MATCH", "FUNCTION_MATCH"),
        *("CLOSURE_MATCH", "BUILTIN_MATCH", "CLASS_MATCH", "MODULE_MATCH"),
    ],
)
def test_a_kind_of_guard_is_still_known(kind: str) -> None:
    from torch._dynamo.guards import GuardBuilder

    # DICT_NOT_CONTAINS and its like are partials of the others, made by functions of this name.
    assert hasattr(GuardBuilder, kind) or hasattr(GuardBuilder, kind.replace("_NOT", ""))


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("LocalSource", ["local_name"]),
        ("GlobalSource", ["global_name"]),
        ("AttrSource", ["base", "member"]),
        ("GenericAttrSource", ["base", "member"]),
        ("TypeSource", ["base"]),
        ("TypeDictSource", ["base"]),
        ("TypeMROSource", ["base"]),
        ("ClosureSource", ["base"]),
        ("NNModuleSource", ["base"]),
        ("GetItemSource", ["base", "index"]),
        ("DictGetItemSource", ["base", "index"]),
        ("DictSubclassGetItemSource", ["base", "index"]),
        ("TensorPropertySource", ["base", "prop", "idx"]),
    ],
)
def test_a_source_has_its_fields(kind: str, fields: list[str]) -> None:
    known = {field.name for field in dataclasses.fields(getattr(torch._dynamo.source, kind))}
    assert known.issuperset(fields)


@pytest.mark.parametrize(
    "name",
    [
        *("allow_rnn", "capture_dynamic_output_shape_ops", "assume_static_by_default"),
        *("automatic_dynamic_shapes", "trace_numpy", "capture_scalar_outputs"),
        "side_effect_replay_policy",
    ],
)
def test_dynamo_has_the_setting(name: str) -> None:
    assert hasattr(torch._dynamo.config, name)


def test_the_other_settings_and_contexts() -> None:
    assert torch.fx.experimental._config.backed_size_oblivious is False
    assert hasattr(torch.fx.experimental._config, "patch")
    assert "enabled" in inspect.signature(torch.backends.nnpack.flags).parameters
    assert hasattr(get_metrics_context(), "__enter__")
    describer = MetaTensorDescriber(copy_data=False)
    assert hasattr(describer.lookup_tensor, "clear")
    assert hasattr(describer.lookup_storage, "clear")


def test_the_configuration_is_put_back() -> None:
    before = torch._dynamo.config.allow_rnn, torch.fx.experimental._config.backed_size_oblivious
    with dynamo._configured():
        assert torch._dynamo.config.allow_rnn
        assert torch.fx.experimental._config.backed_size_oblivious
    after = torch._dynamo.config.allow_rnn, torch.fx.experimental._config.backed_size_oblivious
    assert after == before


class Branches(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.sum() > 0 else x - 1


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x + 1


def test_a_refusal_tells_its_kind_and_the_users_line() -> None:
    with dynamo._configured(), pytest.raises(torch._dynamo.exc.TorchDynamoException) as told:
        convert_frame.fullgraph_capture(Branches().forward, (torch.ones(3),), {})
    error: Any = told.value
    assert error.gb_type.startswith(refusals._VALUE_DEPENDENT)
    frame = error.real_stack[-1]
    assert frame.filename.endswith("test_dynamo_interface.py")
    assert "if x.sum() > 0" in frame.line
    assert isinstance(frame.lineno, int)


def test_side_effects_are_told_in_a_warning() -> None:
    with dynamo._configured() as effects:
        convert_frame.fullgraph_capture(Counts().forward, (torch.ones(3),), {})
    assert len(effects) == 1
    assert "double check: " in effects[0]
    assert "self" in effects[0].partition("double check: ")[2]


def test_a_graph_is_left_in_the_globals_under_a_known_name(capture: Capture) -> None:
    left = capture.output.backend_input.backend_id
    assert left in Captured.forward.__globals__
    dynamo._forget_code(capture.module.forward, left)
    assert left not in Captured.forward.__globals__


def test_symbolic_numbers_answer_without_a_guard(capture: Capture) -> None:
    shapes = torch.fx.experimental.symbolic_shapes
    size = next(
        node.meta["example_value"]
        for node in capture.graph.graph.nodes
        if isinstance(node.meta.get("example_value"), torch.SymInt)
    )
    guards = len(capture.common.shape_env.guards)
    assert shapes.statically_known_true(size >= 0)
    assert not shapes.statically_known_true(size > 3)
    assert not shapes.free_unbacked_symbols(size)
    assert size.node.expr.is_Symbol
    assert len(capture.common.shape_env.guards) == guards
    assert issubclass(shapes.GuardOnDataDependentSymNode, Exception)


@pytest.mark.parametrize(
    "name",
    [
        *("sym_min", "sym_max", "sym_sum", "sym_float", "sym_int", "_sym_sqrt", "_sym_log2"),
        *("_sym_sin", "_sym_cos", "_sym_tan", "_sym_asin", "_sym_acos", "_sym_atan"),
        *("_sym_sinh", "_sym_cosh", "_sym_tanh"),
    ],
)
def test_a_function_of_sizes_has_its_name(name: str) -> None:
    assert callable(getattr(torch, name))


_SPARED = """
import sys
import torch
from torch import nn
from torch._dynamo import convert_frame
from ovshim.capture import dynamo

class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.linear(x) + self.calls

with dynamo._configured() as effects:
    made = convert_frame.fullgraph_capture(Counts().forward, (torch.ones(3, 4),), {})
(linear, *_) = [node for node in made.backend_input.graph_module.graph.nodes if node.stack_trace]
assert "self.linear(x)" in linear.stack_trace, linear.stack_trace
(told,) = effects
found = [name for name in ("networkx", "torch._inductor.codecache", "torch.export._trace",
         "torch.distributed.tensor.experimental._func_map", "torch._functorch.aot_autograd")
         if name in sys.modules]
assert not found, found
import torch.export._trace
with dynamo._configured() as effects:
    convert_frame.fullgraph_capture(Counts().forward, (torch.ones(3, 4),), {})
assert effects == [told], effects
"""


def test_what_nobody_needs_is_not_imported_and_the_answers_are_the_same(tmp_path: Path) -> None:
    script = tmp_path / "spared.py"
    script.write_text(_SPARED)  # where messages can quote its lines
    paths = [str(Path(ovshim.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    subprocess.run([sys.executable, "-W", "ignore", str(script)], check=True, env=environment)


def places() -> list[Any]:
    from torch._dynamo import graph_region_tracker, output_graph, symbolic_convert
    from torch._dynamo.variables.higher_order_ops import LocalMapWrappedHigherOrderVariable

    return [
        vars(symbolic_convert.InstructionTranslator)["_throw_if_in_functorch"],
        vars(LocalMapWrappedHigherOrderVariable)["should_wrap_in_hop"],
        vars(output_graph.OutputGraph)["get_replayed_side_effect_source_refs"],
        graph_region_tracker.InputPickler,
        vars(symbolic_convert)["get_funcname"],
        vars(output_graph)["uninteresting_files"],
        torch.fx.experimental.symbolic_shapes.uninteresting_files,
    ]


def test_what_is_spared_is_where_it_was_and_is_put_back() -> None:
    before = places()
    with spared():
        assert all(one is not other for one, other in zip(before, places(), strict=True))
    assert all(one is other for one, other in zip(before, places(), strict=True))


def test_what_was_left_out_is_done_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo import graph_region_tracker, symbolic_convert

    theirs = torch.fx.experimental.symbolic_shapes.uninteresting_files()
    with spared():
        assert graph_region_tracker.InputPickler().dumps((1, "a"))
        assert vars(symbolic_convert)["get_funcname"](__file__, 40) is None
        log = symbolic_convert.trace_call_log
        monkeypatch.setattr(log, "isEnabledFor", lambda level: True)
        line = inspect.getsourcelines(Captured.forward)[1]
        assert vars(symbolic_convert)["get_funcname"](__file__, line) == "Captured.forward"
        files = torch.fx.experimental.symbolic_shapes.uninteresting_files
        assert files() < theirs
        with concurrent.futures.ThreadPoolExecutor(1) as other:
            assert other.submit(files).result() == theirs
