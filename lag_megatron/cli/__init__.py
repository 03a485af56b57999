"""Commands: each module parses the arguments of one and calls the library."""
