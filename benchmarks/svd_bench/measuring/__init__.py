"""Instruments: clocks, driver counters, the machine's description, the check of an output."""
