"""Numbers of images: metrics, the networks they are measured on, references, comparisons.

Imports config, data, errors, executors, models, sampling, seeds, storage.
"""
