"""One growth event: the coordinator, the workers that train candidates, and the decision."""
