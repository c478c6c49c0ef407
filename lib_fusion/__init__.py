"""Combine diffusion models while they denoise: the package behind the WebUI extension and the command line."""

__version__ = "1.0.0"
