"""Probes of candidates, the journal of what happened, and the coordinator that decides."""
