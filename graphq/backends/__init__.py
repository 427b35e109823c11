"""Runtimes: a backend turns a verified model into a file, which appears only when it is complete; a runner runs and times one."""
