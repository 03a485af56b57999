"""Checkpoint formats: where each parameter and its optimizer state lies; nothing of growth."""
