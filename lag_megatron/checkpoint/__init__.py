"""Reading and writing checkpoint formats; growth is built on this package, not the reverse."""
