"""Functions on features, and the extractors that make them."""
