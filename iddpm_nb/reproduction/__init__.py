"""The paper's tables and claims, line by line, and the theory of few steps."""
