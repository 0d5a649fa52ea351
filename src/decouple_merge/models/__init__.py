"""The adapters to diffusers, peft and transformers: a base taken apart, run, changed and written.

Imports config, diffusion, merging, storage, seeds.
"""
