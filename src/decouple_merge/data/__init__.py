"""Images, captions and prompts from wherever they are, in batches, and the cache of their latents.

Imports config, errors, models, seeds, storage.
"""
