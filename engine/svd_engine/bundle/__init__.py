"""The bundle: a folder that stands alone.  Schema, reading, plans and what may be in them; builds nothing."""
