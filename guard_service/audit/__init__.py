"""The audit log: a line for each verdict and each refusal, chained by a key, without content."""
