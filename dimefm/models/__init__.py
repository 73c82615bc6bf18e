"""open_clip models, loaded strictly; the towers of a student, their first weights, and open_clip folders."""
