"""What should happen: taxonomy, policies and the decision from scores to actions."""
