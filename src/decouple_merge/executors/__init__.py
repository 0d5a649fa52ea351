"""Where pieces of work run: here, or in processes with a device each.

Imports nothing.
"""
