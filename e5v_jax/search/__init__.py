"""Search over photographs and texts: an index on disk, queries, and a page."""
