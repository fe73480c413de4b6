"""What every training command shares: the loop, run folders, flags, data and plots."""
