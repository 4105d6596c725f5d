"""The Prefect flows: the graph, a registered version judged, a promotion, a batch of images.

The only package that imports prefect. DVC decides what is up to date; Prefect's own caching is off, because two caches
disagree one day.
"""
