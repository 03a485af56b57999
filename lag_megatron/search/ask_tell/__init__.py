"""A search that another training program drives: it asks for trials and tells their losses."""
