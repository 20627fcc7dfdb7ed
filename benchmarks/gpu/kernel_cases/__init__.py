"""What is timed of each kernel, a file for each kind."""
