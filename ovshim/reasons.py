"""Why a call or a module runs in eager: one table of codes, sentences and remedies.

Every fallback names one code of `TABLE`. `docs/reasons.md` lists the same table for
readers, and a test compares the two.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple


class Sentence(NamedTuple):
    """What happened and what to do about it, one sentence each, both ending in a full stop."""

    message: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Reason:
    """One fallback: a stable `code`, a `message` for people and a concrete `remedy`."""

    code: str
    message: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.message} {self.remedy}"

    def to_dict(self) -> dict[str, str]:
        """The three fields as plain strings, for reports and manifests."""
        return {"code": self.code, "message": self.message, "remedy": self.remedy}


def reason(code: str, detail: str = "") -> Reason:
    """Make the reason of that code; `detail` (where, which) is put after the sentence.

    Raises KeyError for a code that `TABLE` does not have: that is a mistake of ours, and a
    code made up on the way would be missing from the documentation.
    """
    message, remedy = TABLE[code]
    detail = " ".join(detail.split()).rstrip(".")
    if detail:
        message = f"{message.removesuffix('.')}: {detail}."
    return Reason(code, message, remedy)


# In the order in which a reader meets them: the module, the call, the build, the verdict.
TABLE: Mapping[str, Sentence] = MappingProxyType(
    {
        # What the module does.
        "unsupported-op": Sentence(
            "An operator has no OpenVINO counterpart.",
            "Replace the operator, or accelerate the submodules beside it one by one.",
        ),
        "value-dependent": Sentence(
            "Which operations run depends on the values of the inputs.",
            "Express the choice with torch.where, or accelerate the submodules on either side.",
        ),
        "random": Sentence(
            "The module draws random numbers.",
            "Pass the random tensors in as arguments, or call eval() if they come from dropout.",
        ),
        "mutates-input": Sentence(
            "The module writes to one of its inputs.",
            "Use the out-of-place operation, or clone the input inside forward.",
        ),
        "mutates-buffer": Sentence(
            "The module writes to one of its parameters or buffers.",
            "Pass the state in and return the new one, or accelerate the submodules without state.",
        ),
        "mutates-attribute": Sentence(
            "The module changes an attribute of itself or of another object.",
            "Return the value instead, or guard the write so that it happens in training only.",
        ),
        "mutates-setting": Sentence(
            "The module changes a setting of torch's that the whole program shares.",
            "Set it once, outside of forward.",
        ),
        "nondeterministic": Sentence(
            "The module answered the same inputs in two different ways.",
            "Make forward depend on its arguments alone.",
        ),
        "aliases-input": Sentence(
            "An output shares memory with an input, a weight or another output without being it.",
            "Return a clone of that tensor.",
        ),
        "unknown-leaf": Sentence(
            "An argument or an output has a type of which nothing is known.",
            "Use tensors, plain constants, tuples, lists, dicts, dataclasses or named tuples, or "
            "register the type with torch.utils._pytree.register_pytree_node.",
        ),
        "inner-hooks": Sentence(
            "A submodule has hooks, which a compiled graph would not call.",
            "Remove the hooks, or accelerate the submodule instead of its parent.",
        ),
        # How the module is called.
        "training": Sentence(
            "The module or one of its submodules is in training mode.",
            "Call eval() on the accelerated module.",
        ),
        "grad": Sentence(
            "Gradients are being recorded, in a way that only eager can.",
            "Call the module under torch.inference_mode() or torch.no_grad().",
        ),
        "backward": Sentence(
            "A backward pass has reached an earlier answer, so gradients are wanted.",
            "Nothing needs doing in training; else call under torch.inference_mode() or "
            "torch.no_grad().",
        ),
        "input-grad": Sentence(
            "An input is a leaf that requires grad.",
            "Nothing needs doing where gradients are wanted; else call under torch.no_grad().",
        ),
        "special-values": Sentence(
            "An input holds NaN or infinity, integers beyond 32 bits or so far beyond the example's"
            " that OpenVINO computes otherwise, or what float16 cannot hold.",
            "Nothing needs doing: eager answers such calls; keep them rare to stay fast.",
        ),
        "out-of-range": Sentence(
            "A value inside has no place in OpenVINO: an index outside of its table, say, a row of"
            " attention that is masked as a whole, or what float16 cannot hold.",
            "Nothing needs doing: eager answers as ever, or raises its usual error.",
        ),
        "autocast": Sentence(
            "Autocast is on, which changes the precision of each operator.",
            "Leave the autocast block and give precision='bf16' or 'fp16' instead.",
        ),
        "special-tensor": Sentence(
            "A tensor is sparse, quantized, meta, fake, nested, complex or of a subclass.",
            "Pass plain dense tensors.",
        ),
        "empty-tensor": Sentence(
            "A tensor has no elements.",
            "Nothing needs doing: eager answers such calls.",
        ),
        "reentered": Sentence(
            "A signal handler or a finalizer has called the module within another call of it.",
            "Nothing needs doing: eager answers such calls.",
        ),
        "special-mode": Sentence(
            "A functorch transform, forward-mode differentiation, a function or dispatch mode, "
            "anomaly detection, hooks on saved tensors or grad mode within inference mode are "
            "active.",
            "Call the module outside the transform or mode.",
        ),
        "not-on-cpu": Sentence(
            "A parameter, a buffer or an input is not in the memory of the CPU.",
            "Move it with .to('cpu'), or load the weights of a meta module; the device= option"
            " chooses where OpenVINO computes.",
        ),
        "untracked-weights": Sentence(
            "Changes of a weight would go unnoticed, because it is sharded, shared by processes, "
            "does not lie in one place or was made in inference mode by a class of its own.",
            "Accelerate the module unsharded, and build or load it outside torch.inference_mode(); "
            "where another process writes to it, call fast.ovshim.refresh().",
        ),
        "double-precision": Sentence(
            "The module computes in float64, which OpenVINO would lower to float32.",
            "Call .float() on the module and on its inputs, or give precision='fp32' to accept"
            " float32.",
        ),
        "decode-call": Sentence(
            "The call asks for something that stateful decoding does not give.",
            "Leave that argument out where it is not needed; generate() by itself passes none.",
        ),
        "cache-unknown": Sentence(
            "The call brings a key-value cache of a kind that OpenVINO does not keep.",
            "Leave past_key_values and cache_implementation out, or give a DynamicCache.",
        ),
        "first-step": Sentence(
            "The first step of an encoder-decoder model runs its encoder's side in eager.",
            "Nothing needs doing; the steps after it are served.",
        ),
        # What the build met.
        "capture-failed": Sentence(
            "The module could not be captured as one graph.",
            "Read the cause with ovshim.explain, or accelerate a submodule that is plainer.",
        ),
        "compile-failed": Sentence(
            "OpenVINO could not compile the captured graph.",
            "Try another device or precision, or accelerate a part of the module.",
        ),
        "out-of-resources": Sentence(
            "There was too little memory or disk, or too few threads or files, to build the plan.",
            "Free some, and call fast.ovshim.refresh() or start the program again.",
        ),
        "infer-failed": Sentence(
            "OpenVINO failed while it was running the compiled graph.",
            "Try another device, or report the module and the message.",
        ),
        "decode-unfit": Sentence(
            "The language model is not one whose steps can be decoded with a state.",
            "Nothing needs doing; calls with use_cache=False may still be accelerated.",
        ),
        "decode-precision": Sentence(
            "Decoding with a cache is not offered in this precision.",
            "Give precision='fp32', 'bf16', 'fp16', 'int8_weights' or 'int4_weights'.",
        ),
        "calibration-unfit": Sentence(
            "The calibration data holds no calls of this kind.",
            "Give calibration data with the arguments, dtypes, ranks and sizes of these calls.",
        ),
        "no-module-paths": Sentence(
            "Which module each operation comes from is not known, so that rules cannot be applied.",
            "Give one precision for the whole module.",
        ),
        "overflow": Sentence(
            "Values are beyond 65504, the largest that float16 holds.",
            "Give precision='bf16', or keep those modules in fp32 by rules.",
        ),
        "proof-failed": Sentence(
            "OpenVINO's outputs did not match those of eager.",
            "Raise tolerance= if that error is acceptable, or choose a higher precision.",
        ),
        "eager-refuses": Sentence(
            "The module itself raised on the example.",
            "Correct the example input so that the module accepts it.",
        ),
        "building": Sentence(
            "The plan for this call was still being built.",
            "Nothing needs doing: calls move to OpenVINO once the plan is ready.",
        ),
        "build-failed": Sentence(
            "The build met an unexpected error.",
            "Read the cause in the log of 'ovshim' at level DEBUG, and report it.",
        ),
        "build-too-slow": Sentence(
            "The build took longer than max_build_seconds.",
            "Raise max_build_seconds=, or build beforehand with a smaller example.",
        ),
        "crashed-before": Sentence(
            "An earlier build of this module killed its process.",
            "Update OpenVINO, or clear the cache directory to try once more.",
        ),
        # What was found, or asked for, afterwards.
        "seldom": Sentence(
            "The module was not called often enough for a build to pay.",
            "Nothing needs doing: what is called more often gets its plan.",
        ),
        "first-use-mismatch": Sentence(
            "For sizes met for the first time, OpenVINO's outputs did not match those of eager.",
            "Report the module and the sizes, or make those dimensions static.",
        ),
        "taking-turns": Sentence(
            "Eager and OpenVINO take turns while calls of sizes that are new are timed.",
            "Nothing needs doing: after some calls the faster one serves.",
        ),
        "new-sizes": Sentence(
            "OpenVINO's first call of each size is slow, and this one is not paid for yet.",
            "Nothing needs doing: sizes that come again are served; prefer='openvino' waits for"
            " none.",
        ),
        "slower": Sentence(
            "Eager is faster for this call on this processor.",
            "Give prefer='openvino' to run it in OpenVINO all the same.",
        ),
        "stale": Sentence(
            "Weights, attributes or structure changed since the plan was made.",
            "Nothing needs doing: the plan is rebuilt; change the module less often to stay fast.",
        ),
        "too-many-plans": Sentence(
            "The module was called in more ways than plans are kept for.",
            "Pass fewer combinations of structure, dtype, rank and constant arguments, or raise"
            " max_plans=.",
        ),
        "not-in-artifact": Sentence(
            "The artifact has no graph for this call.",
            "Call it as it was called before it was saved, or save it after calls like this one.",
        ),
        "prefer-eager": Sentence(
            "The option prefer='eager' was given.",
            "Leave it out, or give prefer='faster' or 'openvino'.",
        ),
        "off": Sentence(
            "ovshim is switched off.",
            "Unset the environment variable OVSHIM, or set it to 1, and accelerate the module"
            " again; leave the block of disabled().",
        ),
    }
)
