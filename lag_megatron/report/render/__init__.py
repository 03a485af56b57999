"""Blocks of a report as HTML, Markdown and SVG."""
