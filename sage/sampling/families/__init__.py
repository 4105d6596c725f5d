"""One file a family of diffusers pipelines: how it encodes prompts, calls its network and decodes latents."""
