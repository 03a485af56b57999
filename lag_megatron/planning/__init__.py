"""Schedules, costs and random paths, computed from a configuration alone."""
