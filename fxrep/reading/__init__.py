"""What a node computes, whatever way it is spelt."""
