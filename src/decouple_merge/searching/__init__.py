"""The searches for merging weights and for schedules: strategies, levels, the workers' queue, scorers, predictors.

Imports config, data, diffusion, errors, evaluation, executors, merging, models, sampling, seeds, storage, training.
"""
