"""A small embedded engine: generation without any WebUI, for the demo, tests, benchmarks and training.

It stands on diffusers (VAE, schedulers), transformers (text encoder) and Pillow; install the extra ``engine``.
"""
