"""The command: verbs to functions, and the live view.

Imports analysis, config, errors, evaluation, experiment, exploring, merging, models, reporting, sampling, searching,
storage, training.
"""
