"""Programs that write generated parts of the documents."""
