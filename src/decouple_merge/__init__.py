"""Decouple-then-Merge for diffusers models: finetune timestep experts, merge them into one better model."""

__version__ = "0.1.0"
