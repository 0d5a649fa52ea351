"""One training of one network, and gradients of its loss.

Imports config, data, diffusion, merging, models, storage, seeds.
"""
