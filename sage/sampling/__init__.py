"""Groups to images: plans, the denoising loop that follows them, and the pipelines (stage `generate`)."""
