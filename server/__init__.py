"""What runs on the machine that coordinates a federation."""
