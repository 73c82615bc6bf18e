"""Trained students written for use elsewhere: a module per format, the check after writing, the model card."""
