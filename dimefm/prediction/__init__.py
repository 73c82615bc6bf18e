"""`predict`: zero-shot classification of a user's own images, with any model, for ONNX students without torch."""
