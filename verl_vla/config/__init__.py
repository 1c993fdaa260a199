"""Every section that a recipe can set, and how YAML becomes one."""
