"""What each rank computes and exchanges, from the layout alone."""
