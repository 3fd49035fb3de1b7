"""Measurements as data: rows, documents, what may stand in one table, and how figures are written."""
