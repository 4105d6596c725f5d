"""Lists of prompts of any length: `sage generate`, `sage group`, and shards for several machines."""
