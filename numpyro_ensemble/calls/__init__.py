"""What a call depends on: arguments, the functions it is given, the programs kept for it."""
