"""Benches: one program for each claim of speed in the README."""
