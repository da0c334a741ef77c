"""What a text-to-image model reads: prompts to sample from, and what is done to captions against memorization."""
