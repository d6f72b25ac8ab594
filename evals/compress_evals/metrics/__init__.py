"""Scores of single answers and texts, as plain functions of strings; no models are involved."""
