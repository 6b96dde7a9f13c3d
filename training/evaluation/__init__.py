"""Experts against their teacher: sampling, measures, metrics, the report."""
