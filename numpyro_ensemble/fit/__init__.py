"""The engine of fits: plain `SVI`, one for each member, in one compiled program."""
