"""Photographs and masks of any common kind, read, resized and written; imports no torch."""
