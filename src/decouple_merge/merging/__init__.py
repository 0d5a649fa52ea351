"""Weights in, weights out: rules, task arithmetic, merges that a network holds, files merged out of core, recipes.

Imports config, errors, seeds, storage.
"""
