"""The shell around the library: stages, the `sage` command, tracking, versioning and the Prefect flow."""
