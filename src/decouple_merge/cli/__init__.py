"""The command: verbs to functions, and the live view.

Imports config, evaluation, experiment, merging, sampling, searching, storage, training.
"""
