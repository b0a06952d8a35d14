"""The command line: one small file for each command, which reads its arguments, calls one function and prints the result."""
