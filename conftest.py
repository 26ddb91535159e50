"""Puts the root of the project on sys.path, so that tests import its modules by name."""
