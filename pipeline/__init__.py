"""Stage 1: the teacher runs once over every image and sentence. The only package that imports ray."""
