"""The search for merging weights: strategies, levels, the workers' queue, the scorer, learned weights.

Imports config, data, diffusion, errors, evaluation, merging, models, sampling, seeds, storage,
training.
"""
