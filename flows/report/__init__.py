"""What people look at: report page, comparison page, map of the groups, tables."""
