"""Watching a run: metrics, alerts, samples, speed, the page."""
