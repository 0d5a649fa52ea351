"""A merge under the hand: images of any weights at once, what the search knows of them, and a local page for both.

Imports config, errors, executors, merging, models, sampling, searching, storage.
"""
