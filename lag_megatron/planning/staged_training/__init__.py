"""When to grow, by Staged Training's scaling law."""
