"""Benches of searches: their cost, their rules, and clusters by arithmetic."""
