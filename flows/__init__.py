"""Everything around the library: stages, the `sage` command, tracking, versioning and the Prefect flows."""
