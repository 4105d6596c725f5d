"""One file for each stage of `dvc.yaml`: files in, `sage`, files out."""
