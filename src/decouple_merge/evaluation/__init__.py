"""Metrics, the networks they are measured on, and scores against references.

Imports config, data, executors, models, sampling, storage, seeds.
"""
