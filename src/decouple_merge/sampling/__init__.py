"""Images drawn from a model.

Imports config, data, diffusion, errors, executors, merging, models, seeds, storage.
"""
