"""What a person gets to see: console, curves, records and summary."""
