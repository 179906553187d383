"""FIRM-Bench: how far a critic is from people, and what its mean absolute error hides."""
