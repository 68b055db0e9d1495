"""Run PyTorch modules through OpenVINO, proved against eager and with eager to fall back on."""

__version__ = "0.1.0"
