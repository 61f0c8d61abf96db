"""HTTP in, HTTP out. Never loads torch."""
