"""What a program writes: by one process at a time, and apart from what it reads."""
