"""Commands that are not stages of dvc.yaml."""
