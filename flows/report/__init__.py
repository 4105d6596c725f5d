"""Output for people: report page, comparison page, map of the groups, tables."""
