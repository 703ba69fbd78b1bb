"""From checkpoint and data to a guard artifact: the offline pipeline."""
