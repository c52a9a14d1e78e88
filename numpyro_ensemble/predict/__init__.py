"""What is made from the members of a fit: predictions and ArviZ data."""
