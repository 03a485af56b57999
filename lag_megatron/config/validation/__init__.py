"""Checks of a whole configuration, beyond what the types of its keys say."""
