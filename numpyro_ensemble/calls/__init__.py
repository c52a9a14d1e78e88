"""What a call depends on: its arguments, its functions, and the programs kept for it."""
