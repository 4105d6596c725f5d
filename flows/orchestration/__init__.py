"""The Prefect flows: run the stages, evaluate a registered version, promote a version, generate a batch of images.

The only package that imports prefect. DVC decides what is up to date; Prefect's caching is off, because two caches
could disagree.
"""
