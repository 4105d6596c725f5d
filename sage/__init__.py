"""SAGE: semantic-aware shared sampling for text-to-image diffusion (arXiv 2509.15865)."""
