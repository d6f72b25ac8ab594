"""Scores of single answers and texts: plain functions of strings, no models."""
