"""Pixels and chores. Never loads flask."""
