"""Images with captions: read, checked, split into training, validation and test (stage `prepare`)."""
