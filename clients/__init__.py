"""What runs on a device of a federation."""
