"""One page of what runs hold: read from their folders, judged, drawn, and written as one HTML file.

Imports analysis, config, errors, evaluation, storage.
"""
