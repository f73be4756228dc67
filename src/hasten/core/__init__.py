"""Nouns, errors, the run folder and the guarded child process. No algorithm lives here."""
