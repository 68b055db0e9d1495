"""Whether OpenVINO takes what a user has given it by `properties=`, before anything is built."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from ovshim import runtime
from ovshim.errors import OptionError
from ovshim.options import Options
from ovshim.shortage import SHORTAGE, compile_failure

__all__ = ["check_placement"]

# Of one number, which it gives back.
_LEAST = b"""<net name="least" version="11"><layers>
<layer id="0" name="x" type="Parameter" version="opset1"><data shape="1" element_type="f32"/>
<output><port id="0" precision="FP32"><dim>1</dim></port></output></layer>
<layer id="1" name="y" type="Result" version="opset1">
<input><port id="0" precision="FP32"><dim>1</dim></port></input></layer></layers>
<edges><edge from-layer="0" from-port="0" to-layer="1" to-port="0"/></edges></net>"""


def check_placement(options: Options) -> None:
    """Raise OptionError for a device that is not there, and for properties that it does not take.

    A CPU there is everywhere: to look for other devices takes time.
    """
    if options.device != "CPU":
        runtime.check_device(options.device)
    if options.properties:
        # With types: 1 and True are two values to OpenVINO, and one to a dict.
        given = tuple((name, value, type(value)) for name, value in options.properties.items())
        wrong = _wrong(options.device, given)
        if wrong is not None:
            allowed = f"names and values that OpenVINO takes for {options.device}"
            raise OptionError("properties", dict(options.properties), allowed, wrong)


@functools.lru_cache(maxsize=64)
def _wrong(device: str, given: tuple[tuple[str, Any, type], ...]) -> str | None:
    """What is wrong with these properties, as a sentence; None: nothing.

    The least of graphs is compiled with them, in 20 ms on a CPU: no list of OpenVINO's has all the
    names that it takes, and none the values.
    """
    refusal = _refusal(device, {name: value for name, value, _ in given})
    if refusal is not None:
        # What cannot be compiled without them either is not their fault.
        return None if _refusal(device, {}) else f"OpenVINO says: {refusal}"
    kind = device.partition(":")[0]
    if kind not in runtime.HANDING_ON:
        return None
    # These take any name, and leave out what none of their devices knows.
    own = runtime.supported(kind)
    for name, value, _ in given:
        if name not in own and all(_refusal(d, {name: value}) for d in runtime.members(device)):
            return f"None of its devices knows {name}: correct the name, or leave it out."
    return None


def _refusal(device: str, given: Mapping[str, Any]) -> str | None:
    """What OpenVINO says of properties that it does not compile with; None where it does, or where
    it has had too little memory to tell."""
    settings = runtime.settings(
        device=device,
        precision="fp32",
        hint="latency",
        streams=None,
        threads=None,
        properties=given,
    )
    try:
        runtime.compile_text(_LEAST, device, settings)
    except RuntimeError as error:
        if compile_failure(error).code == SHORTAGE:
            return None
        lines = [line.strip() for line in str(error).splitlines() if line.strip(" ;")]
        return f"{(lines or ['nothing'])[-1][:200].rstrip('.')}."
    return None
