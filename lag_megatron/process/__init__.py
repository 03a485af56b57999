"""This process: its signals, and its output."""
