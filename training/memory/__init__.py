"""What a run holds: how much it takes, what is kept off the device, weights in 8 bits."""
