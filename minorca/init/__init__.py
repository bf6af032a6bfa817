"""A configuration from four answers."""
