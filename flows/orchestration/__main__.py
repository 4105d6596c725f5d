"""`python -m flows.orchestration`: set up the server at PREFECT_API_URL to mark killed runs as crashed; idempotent."""

from flows.orchestration.server import watch_for_dead_runs

if __name__ == "__main__":
    watch_for_dead_runs()
