"""The exercises, a module for each notebook, in a folder for each part of the course."""
