"""How good samples are: FID, Inception score, precision and recall, and what a figure must say about itself."""
