"""OpenVINO's binding is loaded by itself, and nobody can tell who imports the package later."""

import json
import sys

import pytest
from checks import run_python

from ovshim.binding import binding

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there the package is imported")


def told(source: str) -> dict[str, object]:
    found: dict[str, object] = json.loads(run_python(source))
    return found


def test_a_hit_needs_no_package() -> None:
    script = """
import json, sys, torch, ovshim
from modules import Mlp, make
module, x = make(Mlp), torch.linspace(-1, 1, 40).view(5, 8)
fast = ovshim.accelerate(module, torch.ones(3, 8), prefer="openvino")
with torch.inference_mode():
    torch.testing.assert_close(fast(x), module(x), rtol=1e-4, atol=1e-5)
plan, = ovshim.explain(fast).to_dict()["plans"]
print(json.dumps({"cache": plan["cache"], "package": "openvino" in sys.modules,
                  "served": fast.ovshim.stats()["openvino"]}))
"""
    assert told(script) == {"cache": "miss", "package": True, "served": 1}
    assert told(script) == {"cache": "hit", "package": False, "served": 1}


def test_the_package_that_is_imported_later_is_whole() -> None:
    source = """
import json, sys
if {loaded}:
    from ovshim.binding import binding
    import importlib.util
    before, loaded = list(sys.meta_path), binding()
    assert sys.modules.keys().isdisjoint({{"openvino", "openvino._pyopenvino"}})
    assert binding() is loaded and sys.meta_path == before
    assert importlib.util.find_spec("openvino").loader.get_filename("openvino")
    assert "openvino" not in sys.modules
sys.modules["openvino_telemetry"] = None
import openvino, openvino._pyopenvino
if {loaded}:
    assert openvino._pyopenvino is sys.modules["openvino._pyopenvino"]
    assert binding() is loaded and sys.meta_path == before
    for name, held in vars(openvino._pyopenvino).items():
        assert held is vars(loaded)[name], name
assert openvino.Tensor is openvino._pyopenvino.Tensor
print(json.dumps({{
    "names": sorted(vars(openvino)), "origin": openvino.__spec__.origin,
    "loader": [type(at.__loader__).__name__ for at in (openvino, openvino._pyopenvino)],
    "same": openvino.__spec__.loader is openvino.__loader__,
    "inner": sorted(name for name in sys.modules if name.startswith("openvino.")),
}}))
"""
    assert told(source.format(loaded=True)) == told(source.format(loaded=False))


def test_threads_that_import_both_at_once_find_both_whole() -> None:
    source = """
import json, sys, threading
from ovshim.binding import binding
sys.modules["openvino_telemetry"] = None
sys.setswitchinterval(1e-5)
start, found, failed = threading.Barrier(8), [], []
def one(n):
    start.wait()
    try:
        if n % 2:
            import openvino
            found.append((openvino.Core, openvino._pyopenvino.Tensor)[1])
        else:
            found.append(binding().Tensor)
    except BaseException as error:
        failed.append(repr(error))
threads = [threading.Thread(target=one, args=(n,)) for n in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(json.dumps({"failed": failed, "found": len(found), "kinds": len(set(found))}))
"""
    for _ in range(3):
        assert told(source) == {"failed": [], "found": 8, "kinds": 1}


def test_where_it_cannot_be_loaded_by_itself_the_package_is_imported() -> None:
    source = """
import importlib.machinery, json, sys
sys.modules["openvino_telemetry"] = None
from ovshim.binding import binding
found = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = staticmethod(
    lambda name, path=None, target=None: None if name.endswith("_pyopenvino")
    and sys._getframe(1).f_globals["__name__"] == "ovshim.binding" else found(name, path, target))
binding().Core()
print(json.dumps("openvino" in sys.modules))
"""
    assert told(source) is True


@pytest.mark.parametrize("blocked", ["openvino", "openvino._pyopenvino"])
def test_what_is_blocked_stays_blocked(blocked: str) -> None:
    source = f"""
import json, sys
sys.modules[{blocked!r}] = None
from ovshim.binding import binding
try:
    binding()
except ImportError as error:
    print(json.dumps(str(error)))
"""
    assert told(source) == f"import of {blocked} halted; None in sys.modules"


def test_both_compile_beside_each_other() -> None:
    source = """
import json
import numpy as np
from ovshim.binding import binding
own = binding().Core()
import openvino as ov
from openvino import opset13 as ops
x = ops.parameter([2, 2], np.float32)
model = ov.Model([ops.relu(x)], [x], "relu")
given = np.array([[-1, 1], [2, -2]], np.float32)
theirs = ov.Core().compile_model(model, "CPU")
ours = ov.CompiledModel(own.compile_model(model._Model__model, "CPU", {}))
tensor = ov.Tensor(given)
print(json.dumps([ours(given)[0].tolist() == theirs(given)[0].tolist() == [[0, 1], [2, 0]],
                  isinstance(tensor, binding().Tensor)]))
"""
    assert told(source) == [True, True]


def test_it_is_the_package_s_own_where_that_is_imported() -> None:
    import openvino

    assert binding() is openvino._pyopenvino  # type: ignore[attr-defined]
