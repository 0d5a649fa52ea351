"""The adapters to diffusers, peft and transformers: a base taken apart, run, changed and written.

Imports config, diffusion, errors, merging, seeds, storage.
"""
