"""Tests that are files of your own questions."""
