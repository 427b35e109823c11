"""Writing results: each backend turns a verified model into a file, which appears only when it is complete."""
