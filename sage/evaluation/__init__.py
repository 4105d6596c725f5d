"""Metrics with confidence intervals, and the gates that use them (stage `evaluate`)."""
