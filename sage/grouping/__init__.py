"""From prompts to groups of similar prompts (stage `group`)."""
