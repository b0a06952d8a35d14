"""What the processes run that tests start."""
