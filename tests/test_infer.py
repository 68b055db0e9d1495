"""The engine: right values, owned outputs and untouched inputs, whatever the sizes and threads."""

import gc
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset13 as ops
import pytest
import torch

from ovshim import infer, runtime, slots
from ovshim.infer import Engine, EngineDead, SpecialValuesError
from ovshim.single import SingleThreadEngine

_LARGE = 80_000  # float32: over the sizes from which inputs and outputs are bound in place

_TYPES = {
    torch.float32: ov.Type.f32,
    torch.float64: ov.Type.f64,
    torch.float16: ov.Type.f16,
    torch.bfloat16: ov.Type.bf16,
    torch.int8: ov.Type.i8,
    torch.int16: ov.Type.i16,
    torch.int32: ov.Type.i32,
    torch.int64: ov.Type.i64,
    torch.uint8: ov.Type.u8,
    torch.bool: ov.Type.boolean,
}


def compiled(
    body: Callable[..., Sequence[Any]],
    *parameters: tuple[Sequence[int], torch.dtype],
) -> Any:
    inputs = [ops.parameter(list(shape), _TYPES[dtype]) for shape, dtype in parameters]
    results = [ops.result(output) for output in body(*inputs)]
    return runtime.core().compile_model(
        ov.Model(results, inputs, "test"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )


def one(value: float) -> Any:
    return ops.constant(np.float32(value))


def relu_engine(shape: Sequence[int] = (-1,)) -> Engine:
    """Relu plus one: for a size of 80,000 with input and output bound in place."""
    model = compiled(lambda x: [ops.add(ops.relu(x), one(1))], (shape, torch.float32))
    return Engine(model, [torch.float32], [torch.float32])


def eager(x: torch.Tensor) -> torch.Tensor:
    return torch.relu(x) + 1


SIZES = [pytest.param(5, id="copied"), pytest.param(_LARGE, id="in place")]
MODES = [torch.inference_mode, torch.no_grad, torch.enable_grad]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dynamic", [True, False])
def test_later_calls_and_the_engines_end_leave_outputs_alone(size: int, dynamic: bool) -> None:
    engine = relu_engine((-1,) if dynamic else (size,))
    xs = [torch.randn(size) for _ in range(6)]
    kept = [engine.run([x])[0] for x in xs]
    views = [tensor[1:] for tensor in kept[:3]]
    del kept[:3]  # their views alone must keep the buffers
    gc.collect()
    for _ in range(3):
        engine.run([torch.randn(size)])
    del engine
    gc.collect()
    for x, view in zip(xs, views, strict=False):
        torch.testing.assert_close(view, eager(x)[1:])
    for x, tensor in zip(xs[3:], kept, strict=True):
        torch.testing.assert_close(tensor, eager(x))


@pytest.mark.parametrize("size", SIZES)
def test_arrays_and_storages_taken_from_an_output_hold_it(size: int) -> None:
    engine = relu_engine((size,))
    engine.run([torch.randn(size)])
    x = torch.randn(size)
    array = engine.run([x])[0].numpy()
    y = torch.randn(size)
    storage = engine.run([y])[0].untyped_storage()
    for _ in range(3):
        engine.run([torch.randn(size)])
    np.testing.assert_allclose(array, eager(x).numpy())
    torch.testing.assert_close(torch.empty(0).set_(storage), eager(y))  # type: ignore[call-overload]


def test_a_dropped_large_buffer_is_used_again_and_a_held_one_is_not() -> None:
    if slots.ALONE < 0:
        pytest.skip("this interpreter does not count references")
    engine = relu_engine((_LARGE,))
    x = torch.randn(_LARGE)
    engine.run([x])  # shows that the output is large
    assert engine._pool.free[0].large == (0,)
    first = engine.run([x])[0].data_ptr()
    held = engine.run([x])[0]
    assert held.data_ptr() == first
    assert engine.run([x])[0].data_ptr() != first


@pytest.mark.parametrize("size", SIZES)
def test_inputs_are_read_each_time_and_never_written(size: int) -> None:
    engine = relu_engine()
    x = torch.randn(size)
    for _ in range(3):
        x.add_(0.5)
        before = x.clone()
        torch.testing.assert_close(engine.run([x])[0], eager(before))
        assert torch.equal(x, before)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("called", MODES)
@pytest.mark.parametrize("made", MODES)
def test_outputs_are_those_of_the_mode_they_are_made_in(
    size: int,
    made: Callable[[], AbstractContextManager[None]],
    called: Callable[[], AbstractContextManager[None]],
) -> None:
    engine = relu_engine((size,))
    with made():
        engine.run([torch.randn(size)])
    with called():
        x = torch.randn(size)
        want = eager(x)
        got = engine.run([x])[0]
        assert got.is_inference() == want.is_inference()
        assert not got.requires_grad
        torch.testing.assert_close(got.mul_(2), want.mul_(2))
        torch.testing.assert_close(engine.run([x])[0], eager(x))


@pytest.mark.parametrize("size", SIZES)
def test_an_input_that_requires_grad_leaves_no_graph_behind(size: int) -> None:
    engine = relu_engine()
    x = torch.randn(size, requires_grad=True)
    engine.run([torch.randn(size)])
    for _ in range(2):
        torch.testing.assert_close(engine.run([x])[0], eager(x).detach())
    gone = weakref.ref(x)
    del x
    gc.collect()
    assert gone() is None
    assert not engine.run([torch.randn(size)])[0].requires_grad


@pytest.mark.parametrize("length", [3, 50_000])
@pytest.mark.parametrize("dtype", _TYPES, ids=str)
def test_every_dtype_keeps_its_bits(dtype: torch.dtype, length: int) -> None:
    model = compiled(lambda x: [ops.concat([x, x], 0)], ((-1, 4), dtype))
    engine = Engine(model, [dtype], [dtype])
    for _ in range(2):
        x = torch.randint(0, 2 if dtype == torch.bool else 100, (length, 4)).to(dtype)
        got = engine.run([x])[0]
        assert got.dtype == dtype
        assert torch.equal(got, torch.cat([x, x]))


@pytest.mark.parametrize("length", [3, 80_000])
def test_values_are_converted_where_the_model_has_another_type(length: int) -> None:
    model = compiled(
        lambda x, y: [ops.add(x, x), ops.relu(y)], ((-1,), torch.int32), ((-1,), torch.bfloat16)
    )
    engine = Engine(model, [torch.int64, torch.float32], [torch.int64, torch.float32])
    x = torch.randint(-100, 100, (length,))
    y = torch.randint(-100, 100, (length,)).float()  # exact in bf16
    doubled, positive = engine.run([x, y])
    assert doubled.dtype == torch.int64
    assert torch.equal(doubled, x + x)
    assert positive.dtype == torch.float32
    assert torch.equal(positive, y.relu())


def test_types_and_numbers_that_cannot_be_right_are_refused() -> None:
    model = compiled(lambda x: [ops.relu(x)], ((-1,), torch.float32))
    with pytest.raises(TypeError, match="complex64"):
        Engine(model, [torch.complex64], [torch.float32])
    with pytest.raises(ValueError, match="2 inputs"):
        Engine(model, [torch.float32] * 2, [torch.float32])
    engine = Engine(model, [torch.float32], [torch.float32])
    with pytest.raises(ValueError, match="0 tensors for 1"):
        engine.run([])
    odd = runtime.core().compile_model(
        ov.Model([ops.relu(x := ops.parameter([2], ov.Type.u32))], [x], "test"), "CPU"
    )
    with pytest.raises(TypeError, match="element type"):
        Engine(odd, [torch.int64], [torch.int64])


def strided(size: int) -> dict[str, torch.Tensor]:
    base = torch.randn(2 * size, 6)
    complexes = torch.randn(size, 3, dtype=torch.complex64)
    return {
        "transposed": torch.randn(3, size).t(),
        "sliced": base[::2, 1:4],
        "offset": base[1 : size + 1, :3],
        "expanded": torch.randn(1, 3).expand(size, 3),
        "negative bit": complexes.conj().imag,
        "negative bit, contiguous": torch._neg_view(base[:size, :3].contiguous()),
        "flipped": base[:size, :3].flip(0),
        "parameter": torch.nn.Parameter(base[:size, :3].clone(), requires_grad=False),
    }


@pytest.mark.parametrize("kind", strided(1))
@pytest.mark.parametrize("size", [4, _LARGE])
def test_strides_do_not_matter(kind: str, size: int) -> None:
    engine = relu_engine((-1, 3))
    engine.run([torch.randn(size, 3)])
    x = strided(size)[kind]
    torch.testing.assert_close(engine.run([x])[0], eager(x).detach())


def test_sizes_may_change_with_every_call() -> None:
    engine = relu_engine()
    sizes = [*range(1, 40), 3, _LARGE, 3, _LARGE + 7, _LARGE, 0, 2 * _LARGE, 5, 0, 1, *range(20)]
    kept = []
    for size in (*sizes, *sizes):
        x = torch.randn(size)
        kept.append((x, engine.run([x])[0]))
    for x, got in kept:
        torch.testing.assert_close(got, eager(x))
    (slot,) = engine._pool.free  # one caller at a time never needs a second request
    assert len(slot.ready[0]) == infer._BUFFERS_PER_INPUT


def test_scalars_and_empty_tensors() -> None:
    engine = relu_engine(())
    x = torch.tensor(-3.0)
    got = engine.run([x])[0]
    assert got.shape == ()
    assert got.item() == 1.0
    engine = relu_engine((-1, 4))
    for rows in (0, 2, 0):
        assert engine.run([torch.ones(rows, 4)])[0].shape == (rows, 4)


def test_a_model_without_inputs() -> None:
    model = compiled(lambda: [ops.constant(np.arange(3, dtype=np.float32))])
    engine = Engine(model, [], [torch.float32])
    engine.run([])[0].fill_(9)
    assert engine.run([])[0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("queues", [True, False])
def test_a_model_without_inputs_leaves_its_calls_to_another(queues: bool) -> None:
    model = compiled(lambda: [ops.constant(np.arange(3, dtype=np.float32))])
    engine, other = (Engine(model, [], [torch.float32]) for _ in range(2))
    other.queues = queues
    engine.leave([], other)
    assert engine.run([])[0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dynamic", [True, False])
def test_an_output_that_is_an_input_or_another_output_has_its_own_memory(
    size: int, dynamic: bool
) -> None:
    def body(x: Any) -> list[Any]:
        relu = ops.relu(x)
        flat = ops.reshape(x, ops.constant(np.array([-1])), special_zero=False)
        return [x, relu, relu, flat, ops.add(x, x), x]

    shape = (-1,) if dynamic else (size,)
    engine = Engine(compiled(body, (shape, torch.float32)), [torch.float32], [torch.float32] * 6)
    for _ in range(4):
        x = torch.randn(size)
        want = [x, x.relu(), x.relu(), x, x + x, x]
        want = [tensor.clone() for tensor in want]
        got = engine.run([x])
        x.fill_(7)
        for tensor, right in zip(got, want, strict=True):
            assert torch.equal(tensor, right)
            tensor.fill_(8)  # seen by none of the others
        assert (x == 7).all()


@pytest.mark.parametrize("size", [6, 2 * _LARGE])
def test_outputs_whose_size_depends_on_values(size: int) -> None:
    model = compiled(
        lambda x: [ops.non_zero(x, "i64"), ops.relu(x)],
        ((-1,), torch.float32),
    )
    engine = Engine(model, [torch.float32], [torch.int64, torch.float32])
    kept = []
    for share in (0.1, 0.9, 0.0, 1.0, 0.5, 0.5, 0.9):
        x = (torch.arange(size) < share * size).float()
        kept.append((x, engine.run([x])))
    for x, (where, relu) in kept:
        assert torch.equal(where, x.nonzero().t())
        assert torch.equal(relu, x)


def test_a_small_output_does_not_keep_a_large_buffer() -> None:
    model = compiled(lambda x: [ops.non_zero(x, "i64")], ((-1,), torch.float32))
    engine = Engine(model, [torch.float32], [torch.int64])
    many = torch.ones(2 * _LARGE)
    few = (torch.arange(2 * _LARGE) < _LARGE).float()  # large itself
    engine.run([many])
    buffer = engine.run([many])[0].data_ptr()
    assert engine.run([few])[0].data_ptr() != buffer


def test_a_failed_infer_ends_the_engine() -> None:
    model = compiled(lambda x, y: [ops.add(x, y)], ((-1,), torch.float32), ((-1,), torch.float32))
    engine = Engine(model, [torch.float32] * 2, [torch.float32])
    good = [torch.ones(3), torch.ones(3)]
    kept = engine.run(good)[0]
    assert engine.dead is None
    with pytest.raises(EngineDead) as caught:
        engine.run([torch.ones(2), torch.ones(3)])
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert engine.dead is not None
    with pytest.raises(EngineDead, match="failed"):
        engine.run(good)
    assert kept.tolist() == [2, 2, 2]


def test_sizes_that_the_model_does_not_take_leave_the_engine_usable() -> None:
    engine = relu_engine((-1, 4))
    for wrong in (torch.ones(2, 5), torch.ones(4), torch.ones(_LARGE, 5)):
        with pytest.raises(ValueError, match="input 0"):
            engine.run([wrong])
        assert engine.run([torch.ones(2, 4)])[0].tolist() == [[2] * 4] * 2
    assert engine.dead is None


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("ended", ["values", "sizes", "interrupt", "check"])
def test_outputs_outlast_a_call_that_ends_halfway(
    ended: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = relu_engine((-1, 4))
    if ended == "values":
        engine.check([0])
    for _ in range(3):
        x = torch.randn(size, 4)
        mine = engine.run([x])[0]
        kept = mine.clone()
        if ended == "values":
            with pytest.raises(SpecialValuesError):
                engine.run([torch.full((size, 4), torch.nan)])
        elif ended == "sizes":
            with pytest.raises(ValueError, match="does not take"):
                engine.run([torch.randn(size, 3)])
        elif ended == "check":
            engine.checked = frozenset()
            engine.check([0])
        else:
            with monkeypatch.context() as patch:
                patch.setattr(engine, "_bind_inputs", interrupt)
                with pytest.raises(KeyboardInterrupt):
                    engine.run([torch.randn(size, 4)])
        engine.run([torch.randn(size, 4)])
        assert torch.equal(mine, kept)
        torch.testing.assert_close(engine.run([x])[0], eager(x))


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_call_under_way_when_another_fails_is_not_believed() -> None:
    engine = relu_engine()
    run = engine._infer

    def overtaken(*args: Any) -> Any:
        results = run(*args)
        engine.close("Another call failed.")
        return results

    engine._infer = overtaken
    with pytest.raises(EngineDead, match="Another call failed"):
        engine.run([torch.ones(2)])


@pytest.mark.parametrize("change", ["check", "rest"])
def test_no_request_is_made_while_another_runs(change: str) -> None:
    """It ends the process now and then."""
    engine = relu_engine()
    model, inference, new_slot = engine._compiled, engine._infer, engine._new_slot
    x, made = torch.ones(3), []
    engine.run([x])
    running, go_on = threading.Event(), threading.Event()

    def slow(*args: Any) -> Any:
        running.set()
        assert go_on.wait(10)
        return inference(*args)

    def noted() -> Any:
        made.append(go_on.is_set())
        return new_slot()

    def changed() -> Any:
        engine.check([0]) if change == "check" else engine.rest(lambda: model)
        return engine.run([x])

    engine._infer, engine._new_slot = slow, noted  # type: ignore[method-assign]
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(engine.run, [x])
        assert running.wait(10)
        engine._infer = inference
        other = threads.submit(changed)
        assert wait([other], timeout=0.1).not_done
        go_on.set()
        assert first.result()[0].tolist() == other.result()[0].tolist() == [2, 2, 2]
    assert False not in made


def test_a_closed_engine_says_so() -> None:
    engine = relu_engine()
    kept = engine.run([torch.ones(2)])[0]
    engine.close()
    with pytest.raises(EngineDead, match="closed"):
        engine.run([torch.ones(2)])
    assert kept.tolist() == [2, 2]


def test_threads_get_their_own_answers() -> None:
    weights = torch.randn(16, 16)

    def body(x: Any) -> list[Any]:
        return [ops.matmul(x, ops.constant(weights.numpy()), False, False), ops.relu(x)]

    engine = Engine(compiled(body, ((-1, 16), torch.float32)), [torch.float32], [torch.float32] * 2)
    rows = [1, 2, 3, 6_000]
    inputs = {row: [torch.randn(row, 16) for _ in range(4)] for row in rows}
    start = threading.Barrier(5)
    wrong: list[str] = []

    def hammer(seed: int) -> None:
        start.wait()
        kept = []
        for turn in range(60):
            x = inputs[rows[(seed + turn) % len(rows)]][turn % 4]
            try:
                kept.append((x, engine.run([x])))
            except Exception as error:
                wrong.append(repr(error))
                return
        for x, (product, relu) in kept:
            if not torch.allclose(product, x @ weights, atol=1e-4):
                wrong.append(f"product of {tuple(x.shape)}")
            if not torch.equal(relu, x.relu()):
                wrong.append(f"relu of {tuple(x.shape)}")

    threads = [threading.Thread(target=hammer, args=(seed,)) for seed in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_without_reference_counts_every_buffer_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(infer, "ALONE", -1)
    engine = relu_engine((_LARGE,))
    kept = []
    for _ in range(4):
        x = torch.randn(_LARGE)
        kept.append((x, engine.run([x])[0]))
    assert len({got.data_ptr() for _, got in kept}) == 4
    for x, got in kept:
        torch.testing.assert_close(got, eager(x))


@pytest.mark.parametrize("rows", [3, 20_000])
def test_outputs_of_one_size_are_marked_too(rows: int) -> None:
    """Small ones in the request's own memory, which no answer may stand on."""
    x = ops.parameter([rows, 4], ov.Type.f32)
    model = ov.Model([ops.result(ops.relu(x)), ops.result(ops.abs(x))], [x], "test")
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    made = runtime.core().compile_model(model, "CPU", settings | {"PERFORMANCE_HINT": "LATENCY"})
    engine = SingleThreadEngine(made, [torch.float32], [torch.float32] * 2)
    kept = []
    for _ in range(4):
        given = torch.randn(rows, 4)
        kept.append((given, engine.run([given])))
    for given, (positive, absolute) in kept:
        assert torch.equal(positive, given.relu())
        assert torch.equal(absolute, given.abs())
    infer = engine._infer

    def swallowed(request: Any, _: Any, shared: bool, __: Any) -> dict[int, Any]:
        tensors = [request.get_output_tensor(n).data for n in range(2)]
        return {n: array if shared else array.copy() for n, array in enumerate(tensors)}

    engine._infer = swallowed
    with pytest.raises(EngineDead):
        engine.run([torch.randn(rows, 4)])
    engine._infer = infer
    with pytest.raises(EngineDead):
        engine.run([torch.randn(rows, 4)])


@pytest.mark.parametrize("rows", [1, 8, 70_000])
@pytest.mark.parametrize("sizes", ["open", "fixed"])
def test_an_output_that_is_the_mark_is_no_failure(rows: int, sizes: str) -> None:
    x = ops.parameter([rows if sizes == "fixed" else -1], ov.Type.i32)
    model = ov.Model([ops.result(ops.convert(x, "u8"))], [x], "test")
    made = runtime.core().compile_model(
        model, "CPU", {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY"}
    )
    engine = SingleThreadEngine(made, [torch.int32], [torch.uint8])
    for value in (7, 0xAD, 0x52, 0xAD, 8):
        (got,) = engine.run([torch.full((rows,), value, dtype=torch.int32)])
        assert torch.equal(got, torch.full((rows,), value, dtype=torch.uint8))


def test_a_failure_in_one_thread_is_noticed_and_poisons_no_other_model() -> None:
    """OpenVINO swallows the exception there, and its executor runs the failed request again."""

    def engine() -> SingleThreadEngine:
        x = ops.parameter([-1, 4], ov.Type.f32)
        two = ops.constant(np.ones((2, 4), np.float32))
        model = ov.Model([ops.result(ops.add(ops.relu(x), two))], [x], "test")
        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
        made = runtime.core().compile_model(
            model, "CPU", settings | {"PERFORMANCE_HINT": "LATENCY"}
        )
        assert runtime.hides_failures(made, None)
        return SingleThreadEngine(made, [torch.float32], [torch.float32])

    for _ in range(3):
        one_thread = engine()
        for rows in (2, 1):
            x = torch.randn(rows, 4)
            answers = [one_thread.run([x])[0] for _ in range(3)]
            for got in answers:
                torch.testing.assert_close(got, eager(x).expand(2, 4))
            assert len({got.data_ptr() for got in answers}) == 3
        with pytest.raises(EngineDead):
            one_thread.run([torch.randn(3, 4)])
        with pytest.raises(EngineDead):
            one_thread.run([torch.randn(2, 4)])
        del one_thread
        gc.collect()
