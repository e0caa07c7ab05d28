"""Meshes and shardings, and several processes as one run."""
