"""What every test stands on: a cache of its own, a fixed seed, and no network."""

import os
import zlib
from collections.abc import Callable, Iterator, Sequence

# Before anything imports transformers, which reads it once. Child processes inherit it.
os.environ["HF_HUB_OFFLINE"] = "1"
# Before torch is imported. Eager's threads spin while they wait, which takes the cores from the
# other worker: with one more load on two cores a test takes several times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from collections import Counter
from typing import Any

import hypothesis
import pytest
import torch

# A first call converts and compiles: its length says nothing about the property.
hypothesis.settings.register_profile("ovshim", deadline=None)
hypothesis.settings.load_profile("ovshim")


# Of tests with many cases of seconds each: how many of them run on every change. `nox -s full` runs
# all.
_CASES = {
    "test_a_constant_belongs_to_the_signature": 2,
    "test_a_damaged_entry_is_built_again": 2,
    "test_a_module_in_lower_precision": 1,
    "test_a_module_that_changes_meanwhile": 1,
    "test_a_module_that_takes_two_batch_sizes": 1,
    "test_batches_that_broadcast": 1,
    "test_calibration_data_of_every_kind": 2,
    "test_changed_attributes": 4,
    "test_changed_globals": 2,
    "test_changed_weights": 6,
    "test_compressed_weights": 1,
    "test_experts_that_nobody_is_sent_to": 1,
    "test_later_calls_and_the_engines_end_leave_outputs_alone": 2,
    "test_other_calibration_data_is_another_entry": 1,
    "test_precision_fp32_for_a_module_in_lower_precision": 1,
    "test_sizes_read_in_python": 2,
    "test_tolerances_at_both_ends": 1,
    "test_what_cannot_be_carried_through_fixes_the_size": 2,
    "test_what_cannot_be_differentiated_any_more_says_so": 2,
    "test_outputs_have_eagers_structure": 2,
    "test_residual_blocks_of_known_sizes": 2,
    "test_an_encoder_with_a_decoder_hands_out_both_caches": 1,
    "test_what_a_first_call_fills_is_filled_by_the_users": 4,
    "test_a_layer_in_what_was_empty": 4,
    "test_integers_of_16_bits_wrap_although_the_example_does_not_show_it": 6,
    "test_an_assistant_may_be_accelerated_too": 1,
    "test_with_it_openvino_is_right": 20,
    "test_without_it_openvino_is_wrong_or_refuses": 20,
    "test_a_module_that_sets_is_eagers": 2,
    "test_an_example_is_raced_as_it_lies_in_memory": 2,
    "test_within_an_accelerated_module": 3,
    "test_no_value_is_baked_in": 5,
    "test_an_edit_is_noticed": 8,
    "test_shallow_copies_answer_for_themselves": 6,
    "test_copies_are_accelerated_and_independent": 6,
    "test_a_nan_made_inside_is_eagers": 16,
    "test_infinities_that_meet_are_eagers": 5,
    "test_what_leaves_32_bits_goes_to_eager": 7,
    "test_a_generator_of_the_programs_own_gives_it_the_same_numbers": 3,
    "test_a_cache_that_is_bound_halfway_is_as_it_was_and_harms_no_other": 2,
    "test_gradients_are_eagers": 6,
    "test_a_module_that_seeds_is_eagers": 1,
    "test_answers_are_eagers": 10,
    "test_what_is_wrong_far_out_is_right_as_far_as_can_be": 6,
    "test_a_method_of_caches_that_is_patched": 2,
    "test_a_bad_value_raises_at_once": 10,
    "test_awkward_modules_are_right": 8,
    "test_awkward_modules_warn_once": 6,
    "test_gradients_of_a_module_in_parts_are_eagers": 1,
    "test_a_forked_process_is_right_and_ends": 1,
    "test_nan_and_infinity_give_what_eager_gives": 8,
    "test_any_system_call_may_fail": 2,
    "test_every_way_of_generating_gives_eagers_tokens": 1,
    "test_export_runs_the_original": 5,
    "test_jit_trace_runs_the_original": 5,
    "test_an_encoder_runs_in_openvino_as_well": 1,
    "test_views_with_another_place_in_autograds_graph": 1,
    "test_what_is_not_int8_runs_in_bf16_where_that_is_faster": 1,
    "test_a_change_of_what_attributes_hold_is_seen": 4,
    "test_strides_however_they_are_asked_for": 4,
    "test_a_patch_is_felt_and_gone": 3,
    "test_what_is_no_plain_view": 2,
    "test_what_is_rounded_is_eagers": 2,
    "test_shapes_said_beforehand_need_no_rebuild": 4,
    "test_a_place_that_depends_on_sizes_is_not_the_examples": 2,
    "test_what_changes_the_answer_is_noticed": 5,
    "test_wrong_arguments_are_refused_as_eager_refuses_them": 6,
}


# Where tiny graphs are compiled in every way there is, and the fastest is looked for, whatever is
# tested. It is a quarter of the suite's time: of the other tests every eighth does so on a change.
_OF_TINY_GRAPHS = frozenset(
    {
        "test_answered",
        "test_compiled",
        "test_first_answer",
        "test_hot_path",
        "test_infer",
        "test_lanes",
        "test_rival",
        "test_shortcut",
    }
)
_EVERY = 8


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the further cases as slow, before those are left out."""
    seen: Counter[str] = Counter()
    for item in items:
        name = getattr(item, "originalname", item.name)
        seen[name] += 1
        if seen[name] > _CASES.get(name, seen[name]):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def _away_from_the_users_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """For what fixtures of a wider scope accelerate; each xdist worker has its own session."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OVSHIM_CACHE_DIR", str(tmp_path_factory.mktemp("session-cache")))
        patch.delenv("OVSHIM", raising=False)
        yield


@pytest.fixture(autouse=True)
def _alone(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """A cache directory and a random state that no other test has touched."""
    monkeypatch.setenv("OVSHIM_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.delenv("OVSHIM", raising=False)
    if not _looks_for_ways(request):
        monkeypatch.setattr("ovshim.tiny._is_tiny", lambda *_: False)
    if request.path.stem != "test_garbage":
        # Its look goes through all that pytest and hypothesis have made: 0.4 s each time.
        monkeypatch.setattr("ovshim.garbage.note", lambda *_: None)
    torch.manual_seed(0)


def _looks_for_ways(request: pytest.FixtureRequest) -> bool:
    whole = "not slow" not in request.config.getoption("-m")
    by_turns = zlib.crc32(request.node.name.encode()) % _EVERY == 0
    return whole or by_turns or request.path.stem in _OF_TINY_GRAPHS


@pytest.fixture
def exact_wins(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Graphs for some sizes alone win their race; what was compiled for such."""
    from ovshim import runtime, tiny

    compiled: list[Any] = []
    compile_model = runtime.compile_model

    def noted(*args: Any) -> Any:
        if any(args[3:]):
            compiled.append(args[3])
        return compile_model(*args)

    def rounds(calls: Sequence[Callable[[], Any]], *_: Any, **__: Any) -> list[list[float]]:
        return [[1e-6 / (n + 1)] * 5 for n in range(len(calls))]

    monkeypatch.setattr(runtime, "compile_model", noted)
    monkeypatch.setattr(tiny, "rounds", rounds)
    monkeypatch.setattr(tiny, "_seconds", lambda call: 0.0)
    return compiled
