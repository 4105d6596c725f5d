"""Families: for each supported diffusers pipeline, how it encodes prompts, calls its network and decodes latents."""
