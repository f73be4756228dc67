"""Processes on other machines. No formulas: what is computed there is named by the caller."""
