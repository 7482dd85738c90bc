"""Tests of long windows: how samples are made and how answers are scored."""
