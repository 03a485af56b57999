"""Statistics of a run, from the files of its directory."""
