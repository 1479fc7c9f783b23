"""Pipelines that come with the package, one optional module each: import the module that you want by its path."""
