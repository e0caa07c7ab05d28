"""Evaluations: each is a command that prints a table and writes JSON and a picture, and a function behind it."""
