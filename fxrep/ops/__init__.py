"""What torch's operators are, and whose code a call runs."""
