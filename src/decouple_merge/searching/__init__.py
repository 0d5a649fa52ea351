"""The search for merging weights: strategies, levels, the workers' queue, the scorer, learned weights.

Imports config, data, diffusion, evaluation, merging, models, sampling, training, seeds.
"""
