"""What tools.sweep is made of: the runs asked for, their folders, their processes."""
