"""Many calls at once: what `fast.ovshim.map` and `submit` run on, and `Batcher` for servers."""

from ovshim.serve.batcher import Batcher

__all__ = ["Batcher"]
