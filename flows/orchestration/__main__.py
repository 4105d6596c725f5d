"""`python -m flows.orchestration`: tell the server at PREFECT_API_URL how to know a dead run; again changes nothing."""

from flows.orchestration.server import watch_for_dead_runs

if __name__ == "__main__":
    watch_for_dead_runs()
