"""What DVC and git know: the graph, experiments, integrity of data and models."""
