"""The frozen matrices A and B as a pure function of a seed."""
