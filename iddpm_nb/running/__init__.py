"""A trained model in one hand, and a run in one call."""
