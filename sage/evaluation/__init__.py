"""Metrics with intervals, and the gates that rest on them (stage `evaluate`)."""
