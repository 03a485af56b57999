"""Sections of a report, from its statistics to blocks and figures."""
