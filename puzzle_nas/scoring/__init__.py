"""What a variant in the parent's place costs, and how far a model is from its parent."""
