"""What runs hold: one page on them, read from their folders, judged and drawn; and how far a run is.

Imports analysis, config, errors, evaluation, storage.
"""
