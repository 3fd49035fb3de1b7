"""What is opened, and what is in memory when."""
