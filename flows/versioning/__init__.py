"""DVC and git: the graph of stages, experiments, integrity of data and models."""
