"""Proposing recipes, choosing among them, and proving the choice."""
