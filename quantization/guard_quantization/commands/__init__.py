"""The commands of guard-quantize. What a command needs is imported when it runs."""
