"""Growth: operators, plans and growth maps; ``apply`` executes them on training states."""
