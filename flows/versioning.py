"""What DVC and git know: the graph, what must run, which revision this is. The only file that runs dvc."""

import subprocess


def revision() -> str:
    """Return the commit of the work tree with "-dirty" where tracked files differ; "none" outside git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return "none"
