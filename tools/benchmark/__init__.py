"""What training costs here, in TRL and in a loop written by hand: the same work, measured in turns."""
