"""Prompts to groups of similar prompts (stage `group`)."""
