"""Reading, checking and splitting images with captions (stage `prepare`)."""
