"""Files that are whole or not there: records, safetensors, run folders, models by name.

Imports errors.
"""
