"""What a run needs and how fast it can be on a machine that is not here."""
