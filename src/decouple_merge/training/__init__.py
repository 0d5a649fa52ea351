"""One training of one network: its parametrisation, its loop, its state; and gradients of its loss.

Imports config, data, diffusion, errors, executors, merging, models, seeds, storage.
"""
