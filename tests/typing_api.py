"""The public names as users write them, for mypy to read; nothing here runs.

Each ``type: ignore`` is an assertion: strict mypy objects when the mistake beside it is no longer
one.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack, assert_type

import ovshim
from ovshim.errors import FallbackError, FallbackWarning, OptionError, OvshimError, OvshimWarning
from ovshim.options import OptionFields, Options, resolve
from ovshim.reasons import Reason


def takes_options(options: Options | None = None, **fields: Unpack[OptionFields]) -> Options:
    return resolve(options, fields)


def options_by_name() -> None:
    takes_options()
    takes_options(device="AUTO:GPU,CPU", precision="bf16", tolerance="loose", prefer="openvino")
    takes_options(tolerance=1e-3, streams=2, threads=None, properties={"ENABLE_MMAP": False})
    takes_options(dynamic_shapes={"x": {0: "batch", 2: "length"}})
    takes_options(dynamic_shapes=({0: "batch"}, None), methods=["forward", "decode"])
    takes_options(cache_dir=False)
    takes_options(cache_dir=Path("cache"), max_build_seconds=30, progress=True)
    takes_options(Options(strict=True), hint="throughput", background=True)


def options_are_read() -> None:
    options = Options(device="CPU")
    assert_type(options.device, str)
    assert_type(options.precision, str | Mapping[str, str] | None)
    assert_type(options.tolerance_for("fp32"), float)
    assert_type(options.properties, Mapping[str, str | int | float | bool])


def mistakes_are_seen() -> None:
    takes_options(devise="CPU")  # type: ignore[call-arg]
    takes_options(prefer="fastest")  # type: ignore[arg-type]
    takes_options(tolerance="exact")  # type: ignore[arg-type]
    takes_options(cache_dir=True)  # type: ignore[arg-type]
    Options("CPU")  # type: ignore[call-arg]
    Options().strict = True  # type: ignore[misc]


def programs_as_they_stand() -> None:
    with ovshim.enabled(include=["Bert*"], min_speedup=1.2, precision="bf16") as scope:
        assert_type(scope, ovshim.Scope)
    with ovshim.enabled(device=3):  # type: ignore[arg-type]
        pass
    with ovshim.disabled(), ovshim.enabled(report="r.json", all_threads=True):
        ovshim.enable(prefer="openvino")
        ovshim.disable()
    ovshim.enable(all_threads=True)  # type: ignore[call-arg]
    ovshim.acelerate()  # type: ignore[attr-defined]


@ovshim.enabled()
def decorated(number: int) -> str:
    return str(number)


assert_type(decorated(3), str)


def errors_carry_fields(warning: FallbackWarning) -> Any:
    try:
        takes_options()
    except FallbackError as error:
        assert_type(error.reason, Reason)
    except OptionError as error:
        assert_type(error.allowed, str)
        assert_type(error.value, object)
    except OvshimError:
        raise
    assert_type(warning.reason.code, str)
    kept: OvshimWarning = warning
    return kept
