"""A checkpoint: where it lies, its bytes, what they mean, its tokenizer and its prompts."""
