"""Growth: operators, plans and their execution on sharded training states."""
