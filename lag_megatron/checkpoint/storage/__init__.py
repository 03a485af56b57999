"""Files on disk: manifests, checksums, torch's zip and pickle formats, the page cache."""
