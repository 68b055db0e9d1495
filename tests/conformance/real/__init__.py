"""Architectures of transformers, tiny. Importing this registers them all."""

from conformance.real import audio, decoders, multimodal, pictures, series, text, vision

__all__ = ["audio", "decoders", "multimodal", "pictures", "series", "text", "vision"]
