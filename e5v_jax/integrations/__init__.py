"""Wrappers for other projects; each needs that project installed."""
