"""The interfaces that clients speak: each parses its bodies to a task, and prints the answers."""
