"""One file for each stage of `dvc.yaml`: read files, call `sage`, write files."""
