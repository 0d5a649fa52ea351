"""Weights in, weights out: rules, task arithmetic, files merged out of core, recipes and cards.

Imports config, storage, seeds.
"""
