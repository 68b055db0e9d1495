"""`strict`, mistakes that raise at once, and switches: off, nowhere cached, bounded builds."""

import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import check, counts, eager_reasons, falls_back, paths, plans, quietly, run_python
from modules import (
    AlwaysDrops,
    Attention,
    Branches,
    Mlp,
    UsesHistc,
    WritesInput,
    make,
    small_bert,
)
from torch import Tensor, nn

import ovshim

# strict


@pytest.mark.parametrize(
    ("cls", "code"),
    [
        (UsesHistc, "unsupported-op"),
        (Branches, "value-dependent"),
        (AlwaysDrops, "random"),
        (WritesInput, "mutates-input"),
    ],
)
def test_strict_raises_what_would_have_warned(cls: type[nn.Module], code: str) -> None:
    with falls_back(), pytest.raises(ovshim.FallbackError) as told:
        ovshim.accelerate(make(cls), torch.randn(3, 8), strict=True, prefer="openvino")
    assert told.value.reason.code == code
    assert isinstance(told.value, RuntimeError)
    assert isinstance(told.value, ovshim.OvshimError)
    assert str(told.value).endswith(told.value.reason.remedy)


def test_strict_without_an_example_raises_at_the_call() -> None:
    fast = ovshim.accelerate(make(UsesHistc), strict=True, prefer="openvino")
    for _ in range(2):
        with falls_back(), torch.inference_mode(), pytest.raises(ovshim.FallbackError) as told:
            fast(torch.randn(3, 8))
        assert told.value.reason.code == "unsupported-op"


@pytest.mark.slow
def test_strict_raises_where_the_precision_does_not_suffice() -> None:
    with pytest.raises(ovshim.FallbackError) as told:
        ovshim.accelerate(
            make(Mlp), torch.randn(3, 8), precision="bf16", tolerance=1e-9, strict=True
        )
    assert told.value.reason.code == "proof-failed"


def test_strict_serves_what_openvino_can() -> None:
    module = make(Mlp)
    fast = ovshim.accelerate(module, torch.randn(3, 8), strict=True, prefer="openvino")
    for _ in range(3):
        check(fast, module, torch.randn(3, 8))


def test_strict_lets_training_and_gradients_be() -> None:
    module = make(Mlp)
    fast = ovshim.accelerate(module, torch.randn(3, 8), strict=True, prefer="openvino")
    fast.train()
    fast(torch.randn(3, 8)).sum().backward()
    fast.eval()
    with quietly():
        fast(torch.randn(3, 8)).sum().backward()
    fast(torch.randn(3, 8, requires_grad=True)).sum().backward()
    with torch.inference_mode():
        fast(torch.randn(3, 8))
    assert counts(fast)["eager"] >= 3


def test_strict_lets_slower_be() -> None:
    """The race may choose eager: that is no failure."""
    module = make(Mlp)
    fast = ovshim.accelerate(module, torch.randn(3, 8), strict=True, prefer="faster")
    for _ in range(3):
        check(fast, module, torch.randn(3, 8), path=None)
    eager = ovshim.accelerate(module, torch.randn(3, 8), strict=True, prefer="eager")
    check(eager, module, torch.randn(3, 8), path="eager")


def test_strict_raises_under_autocast() -> None:
    fast = ovshim.accelerate(make(Mlp), torch.randn(3, 8), strict=True, prefer="openvino")
    autocast = torch.autocast("cpu", torch.bfloat16)
    with torch.no_grad(), autocast, pytest.raises(ovshim.FallbackError) as told:
        fast(torch.randn(3, 8))
    assert told.value.reason.code == "autocast"


def test_strict_and_the_users_exception() -> None:
    fast = ovshim.accelerate(make(Mlp), torch.randn(3, 8), strict=True, prefer="openvino")
    with torch.inference_mode(), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fast(torch.randn(3, 9))


def test_strict_and_changed_weights() -> None:
    """Staleness passes by itself: the call is served, one way or the other."""
    module = make(Mlp)
    fast = ovshim.accelerate(module, torch.randn(3, 8), strict=True, prefer="openvino")
    with torch.no_grad():
        module.last.bias.add_(1)
    for _ in range(3):
        check(fast, module, torch.randn(3, 8), path=None)
    check(fast, module, torch.randn(3, 8))


def test_strict_and_another_signature() -> None:
    module = make(Mlp)
    fast = ovshim.accelerate(module, torch.randn(3, 8), strict=True, prefer="openvino")
    for _ in range(3):
        check(fast, module, torch.randn(2, 3, 8), path=None)
    check(fast, module, torch.randn(2, 3, 8))


# Mistakes


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("device", "TPU"),
        ("device", "CPU,GPU"),
        ("device", ""),
        ("device", 3),
        ("precision", "fp7"),
        ("precision", torch.float32),
        ("tolerance", 0),
        ("tolerance", -1.0),
        ("tolerance", "tight"),
        ("tolerance", float("nan")),
        ("dynamic_batch", "yes"),
        ("dynamic_shapes", "batch"),
        ("dynamic_shapes", {"nothing": {0: "batch"}}),
        ("prefer", "fastest"),
        ("hint", "speed"),
        ("streams", 0),
        ("threads", -1),
        ("properties", {"INFERENCE_PRECISION_HINT": "bf16"}),
        ("properties", ["A"]),
        ("inplace", 1),
        ("methods", ["nothing"]),
        ("methods", []),
        ("methods", ["training"]),
        ("strict", "no"),
        ("cache_dir", 3),
        ("cache_dir", True),
        ("max_build_seconds", 0),
        ("progress", "bar"),
    ],
)
def test_a_bad_value_raises_at_once(name: str, value: Any) -> None:
    module = make(Mlp)
    before = dict(module.__dict__)
    with falls_back(), pytest.raises(ovshim.OptionError) as told:
        ovshim.accelerate(module, torch.randn(3, 8), **{name: value})
    assert told.value.name == name
    assert isinstance(told.value, ValueError)
    assert told.value.allowed
    assert told.value.remedy
    assert str(told.value).endswith(told.value.remedy)
    assert module.__dict__.keys() == before.keys()


def test_an_unknown_device_tells_which_there_are() -> None:
    with pytest.raises(ovshim.OptionError) as told:
        ovshim.accelerate(make(Mlp), torch.randn(3, 8), device="NPU")
    assert told.value.value == "NPU"
    assert "CPU" in str(told.value)


def test_an_unknown_option_tells_its_neighbour() -> None:
    with pytest.raises(ovshim.OptionError, match="precision") as told:
        ovshim.accelerate(make(Mlp), torch.randn(3, 8), precison="fp32")  # type: ignore[call-arg]
    assert "precison" in str(told.value)


@pytest.mark.parametrize(
    "thing",
    [Mlp, lambda x: x, "Mlp", 3, torch.randn(3), [nn.Linear(2, 2)]],
    ids=["class", "function", "text", "number", "tensor", "list"],
)
def test_something_that_is_no_module(thing: Any) -> None:
    with pytest.raises(ovshim.OptionError) as told:
        ovshim.accelerate(thing, torch.randn(3, 8))
    assert told.value.name == "module"
    assert "nn.Module" in told.value.allowed


@pytest.mark.parametrize("example", [[torch.randn(3, 8)], 3, "x", torch.nn.Linear])
def test_an_example_of_no_known_form(example: Any) -> None:
    with pytest.raises(ovshim.OptionError) as told:
        ovshim.accelerate(make(Mlp), example)
    assert told.value.name == "example_input"


def test_examples_that_contradict_each_other() -> None:
    with pytest.raises(ovshim.OptionError):
        ovshim.accelerate(make(Mlp), {"x": torch.randn(3, 8)}, example_kwargs={"x": 1})
    with pytest.raises(ovshim.OptionError):
        ovshim.accelerate(make(Mlp), torch.randn(3, 8), example_kwargs=[1])  # type: ignore[arg-type]
    with pytest.raises(ovshim.OptionError):
        ovshim.accelerate(make(Mlp), {0: torch.randn(3, 8)})
    with pytest.raises(ovshim.OptionError):
        ovshim.accelerate(make(Mlp), torch.randn(3, 8), example_kwargs={"nothing": 1})


def test_options_as_a_whole_and_by_name() -> None:
    options = ovshim.Options(prefer="openvino", tolerance=1e-3)
    fast = ovshim.accelerate(make(Mlp), torch.randn(3, 8), options=options, tolerance=2e-3)
    assert fast.ovshim.options.prefer == "openvino"
    assert fast.ovshim.options.tolerance == 2e-3
    with pytest.raises(ovshim.OptionError):
        ovshim.accelerate(make(Mlp), options={"prefer": "openvino"})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [
        {"hint": "throughput"},
        {"streams": 1, "threads": 1},
        {"threads": 2},
        {"properties": {"ENABLE_CPU_PINNING": False}},
        {"properties": {"SNIPPETS_MODE": "DISABLE"}},
        {"device": "cpu"},
        {"device": "AUTO"},
        {"device": "AUTO:CPU"},
        {"device": "HETERO:CPU"},
        {"progress": True},
        {"dynamic_batch": False},
    ],
)
def test_options_of_openvino_are_served(options: dict[str, Any]) -> None:
    module = make(Mlp)
    fast = ovshim.accelerate(module, torch.randn(3, 8), prefer="openvino", **options)
    for _ in range(2):
        check(fast, module, torch.randn(3, 8))
    assert plans(fast)[0]["precision_run"] == "f32"


def test_a_property_that_openvino_does_not_know() -> None:
    with pytest.raises(ovshim.OptionError, match="NO_SUCH_PROPERTY"):
        ovshim.accelerate(make(Mlp), properties={"NO_SUCH_PROPERTY": 1})


# Preferences


def test_prefer_eager_is_eager_and_silent() -> None:
    module = make(Mlp)
    with falls_back():
        fast = ovshim.accelerate(module, torch.randn(3, 8), prefer="eager")
        check(fast, module, torch.randn(3, 8), path="eager", reason="prefer-eager")


def test_the_race_gives_right_answers_and_tells_its_speedup() -> None:
    module = small_bert(hidden_size=64, intermediate_size=128)
    ids = torch.randint(0, 100, (4, 32))
    with falls_back():
        fast = ovshim.accelerate(module, {"input_ids": ids})
        for _ in range(3):
            check(fast, module, path=None, input_ids=ids)
    (plan,) = plans(fast)
    if plan["path"] == "eager":
        assert plan["reason"]["code"] == "slower"
        assert set(eager_reasons(fast)) == {"slower"}
    if plan["speedup"] is not None:
        assert plan["speedup"] > 0


# Switches


def test_switched_off_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVSHIM", "0")
    module = make(Mlp)
    with falls_back():
        fast = ovshim.accelerate(module, torch.randn(3, 8), prefer="openvino")
        assert type(fast) is Mlp
        check(fast, module, torch.randn(3, 8), path="eager", reason="off")
        check(fast, module, torch.randn(3, 8), path="eager", reason="off")
    assert not list(Path(os.environ["OVSHIM_CACHE_DIR"]).rglob("*.xml"))
    monkeypatch.delenv("OVSHIM")


def test_switched_off_the_options_are_checked_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OVSHIM", "0")
    with pytest.raises(ovshim.OptionError):
        ovshim.accelerate(make(Mlp), torch.randn(3, 8), precision="fp7")


def test_switched_off_strict_does_not_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVSHIM", "0")
    module = make(Mlp)
    fast = ovshim.accelerate(module, torch.randn(3, 8), strict=True)
    check(fast, module, torch.randn(3, 8), path="eager")


def test_switched_off_openvino_is_not_even_imported() -> None:
    output = run_python(
        "import sys, torch, ovshim\n"
        "fast = ovshim.accelerate(torch.nn.Linear(3, 3).eval(), torch.randn(2, 3))\n"
        "with torch.inference_mode(): fast(torch.randn(2, 3))\n"
        "print(sorted({'openvino', 'torch._dynamo', 'nncf'} & set(sys.modules)))",
        OVSHIM="0",
    )
    assert output.strip() == "[]"


def test_importing_is_light() -> None:
    output = run_python(
        "import torch; before = set(sys.modules) if (sys := __import__('sys')) else None\n"
        "import ovshim\n"
        "print(sorted({'openvino', 'torch._dynamo', 'nncf', 'pandas'} & set(sys.modules) - before))"
    )
    assert output.strip() == "[]"


# The cache directory


def test_cache_dir_false_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVSHIM_CACHE_DIR", str(tmp_path / "unused"))
    module = make(Mlp)
    fast = ovshim.accelerate(module, torch.randn(3, 8), cache_dir=False, prefer="openvino")
    check(fast, module, torch.randn(3, 8))
    check(fast, module, torch.randn(2, 3, 8), path=None)
    assert not (tmp_path / "unused").exists()
    assert {plan["cache"] for plan in plans(fast)} == {"off"}


@pytest.mark.parametrize("kind", [str, Path])
def test_a_cache_dir_of_ones_own(kind: Any, tmp_path: Path) -> None:
    module = make(Mlp)
    place = tmp_path / "with space" / "and ü"
    for expected in ("miss", "hit"):
        fast = ovshim.accelerate(
            module, torch.randn(3, 8), cache_dir=kind(place), prefer="openvino"
        )
        check(fast, module, torch.randn(3, 8))
        assert plans(fast)[0]["cache"] == expected
        assert Path(plans(fast)[0]["cache_path"]).is_relative_to(place)


def test_the_environment_names_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVSHIM_CACHE_DIR", str(tmp_path / "named"))
    fast = ovshim.accelerate(make(Mlp), torch.randn(3, 8), prefer="openvino")
    assert Path(plans(fast)[0]["cache_path"]).is_relative_to(tmp_path / "named")


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    """A file where the directory would be: true for every user, root too."""
    (tmp_path / "file").write_text("mine")
    module = make(Mlp)
    with falls_back():
        fast = ovshim.accelerate(
            module, torch.randn(3, 8), cache_dir=tmp_path / "file", prefer="openvino"
        )
        check(fast, module, torch.randn(3, 8))
    assert plans(fast)[0]["cache"] in {"off", "miss"}
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(
    sys.platform == "win32" or not hasattr(os, "geteuid") or os.geteuid() == 0,
    reason="root may write everywhere",
)
def test_a_read_only_cache(tmp_path: Path) -> None:
    place = tmp_path / "cache"
    place.mkdir()
    place.chmod(0o500)
    module = make(Mlp)
    try:
        fast = ovshim.accelerate(module, torch.randn(3, 8), cache_dir=place, prefer="openvino")
        check(fast, module, torch.randn(3, 8))
    finally:
        place.chmod(0o700)


def test_a_read_only_cache_with_an_entry_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make(Mlp)
    ovshim.accelerate(module, torch.randn(3, 8), cache_dir=tmp_path, prefer="openvino")
    refuse_writing(tmp_path, monkeypatch)
    fast = ovshim.accelerate(module, torch.randn(3, 8), cache_dir=tmp_path, prefer="openvino")
    check(fast, module, torch.randn(3, 8))


def test_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_writing(tmp_path, monkeypatch)
    module = make(Mlp)
    with falls_back():
        fast = ovshim.accelerate(module, torch.randn(3, 8), cache_dir=tmp_path, prefer="openvino")
        check(fast, module, torch.randn(3, 8))


def refuse_writing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Renames under the place fail as on a full disk, and new directories too."""

    def full(original: Any) -> Any:
        def refuse(*args: Any, **kwargs: Any) -> Any:
            if any(str(arg).startswith(str(place)) for arg in args):
                raise OSError(28, "No space left on device")
            return original(*args, **kwargs)

        return refuse

    for name in ("replace", "rename", "mkdir"):
        monkeypatch.setattr(os, name, full(getattr(os, name)))


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "empty", "swap"])
def test_a_damaged_entry_is_built_again(damage: str, tmp_path: Path) -> None:
    module = make(Mlp)
    first = ovshim.accelerate(module, torch.randn(3, 8), cache_dir=tmp_path, prefer="openvino")
    entry = Path(plans(first)[0]["cache_path"])
    del first
    for file in sorted(entry.iterdir()):
        content = bytearray(file.read_bytes())
        if damage == "flip":
            if content:
                content[len(content) // 2] ^= 1
            replace(file, bytes(content))
        elif damage == "truncate":
            replace(file, bytes(content[: len(content) // 2]))
        elif damage == "empty":
            replace(file, b"")
        elif damage == "delete" and file.suffix != ".json":
            file.unlink()
        elif damage == "swap" and file.suffix == ".bin":
            replace(file, bytes(reversed(content)))
    with falls_back():
        fast = ovshim.accelerate(module, torch.randn(3, 8), cache_dir=tmp_path, prefer="openvino")
        check(fast, module, torch.randn(3, 8))
    assert plans(fast)[0]["cache"] == "miss"
    again = ovshim.accelerate(module, torch.randn(3, 8), cache_dir=tmp_path, prefer="openvino")
    check(again, module, torch.randn(3, 8))
    assert plans(again)[0]["cache"] == "hit"


def replace(file: Path, content: bytes) -> None:
    """Write beside it and rename: the old content may be mapped into memory."""
    other = file.with_name(file.name + ".new")
    other.write_bytes(content)
    os.replace(other, file)


@pytest.mark.slow
def test_entries_are_for_their_weights_and_their_code(tmp_path: Path) -> None:
    class Louder(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 10

    class Quieter(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 0.1

    Quieter.__qualname__ = Louder.__qualname__
    other = make(Mlp)
    with torch.no_grad():
        other.last.bias.add_(1e-6)
    for module in (make(Mlp), other, make(Louder), make(Quieter)):
        for expected in ("miss", "hit"):
            fast = ovshim.accelerate(
                module, torch.randn(3, 8), cache_dir=tmp_path, prefer="openvino"
            )
            check(fast, module, torch.randn(3, 8), tolerance=1e-6)
            assert plans(fast)[0]["cache"] == expected


# Time


def test_a_build_that_takes_too_long() -> None:
    module = make(Attention)
    started = time.monotonic()
    with falls_back("build-too-slow") as told:
        fast = ovshim.accelerate(
            module, torch.randn(2, 5, 16), max_build_seconds=1e-3, prefer="openvino"
        )
    assert time.monotonic() - started < 30
    assert "max_build_seconds" in told[0].reason.remedy
    check(fast, module, torch.randn(2, 5, 16), path="eager", reason="build-too-slow")
    assert paths(fast) == ["eager"]


def test_a_build_that_takes_too_long_is_not_tried_at_every_call() -> None:
    module = make(Attention)
    with quietly():
        fast = ovshim.accelerate(module, max_build_seconds=1e-3, prefer="openvino")
        check(fast, module, torch.randn(2, 5, 16), path="eager")
        started = time.monotonic()
        for _ in range(20):
            check(fast, module, torch.randn(2, 5, 16), path="eager", reason="build-too-slow")
    assert time.monotonic() - started < 2


def test_no_bound_on_the_build() -> None:
    module = make(Mlp)
    fast = ovshim.accelerate(
        module, torch.randn(3, 8), max_build_seconds=float("inf"), prefer="openvino"
    )
    check(fast, module, torch.randn(3, 8))


def test_nothing_is_printed(capfd: Any) -> None:
    """Neither by us nor by OpenVINO or torch: not on a terminal, no bars."""
    module = make(Mlp)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast = ovshim.accelerate(module, torch.randn(3, 8), prefer="openvino")
        check(fast, module, torch.randn(3, 8))
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""
