"""What runs, in order: the only place where families and weights meet."""
