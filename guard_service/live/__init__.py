"""What changes while the service runs: policies, models, and whatever else is made of files."""
