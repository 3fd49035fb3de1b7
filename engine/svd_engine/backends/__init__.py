"""Backends: each gives a `Network` for a row of the tensor table.  None knows another."""
