"""One run folder, from its config to its results.

Imports analysis, config, data, diffusion, errors, evaluation, executors, merging, models, reporting, sampling,
searching, seeds, storage, training.
"""
