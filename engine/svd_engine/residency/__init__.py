"""What is opened, and what is in memory when: `contract` says what a strategy is, each has its file."""
