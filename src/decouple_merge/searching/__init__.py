"""The search for merging weights: strategies, levels, the workers' queue, the objective.

Imports config, data, diffusion, evaluation, executors, merging, models, sampling, storage, training, seeds.
"""
