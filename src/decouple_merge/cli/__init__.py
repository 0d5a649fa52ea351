"""The command: verbs to functions, and the live view.

Imports analysis, config, errors, evaluation, experiment, merging, sampling, searching, storage, training.
"""
