"""Scores of predicted masks against the truth, and their report; imports nothing."""
