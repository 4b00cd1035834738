"""What is measured, one meter a file: each adds up what it sees, batch by batch, and merges what processes saw."""
