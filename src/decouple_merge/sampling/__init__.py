"""Images drawn from a model.

Imports config, data, diffusion, executors, models, storage.
"""
