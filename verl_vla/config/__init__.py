"""Sections and options of a recipe, and their composition from YAML files."""
