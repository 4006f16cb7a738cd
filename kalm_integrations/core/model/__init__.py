"""The passes over the model: tensors in, tensors out."""
