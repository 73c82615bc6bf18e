"""What a student leaves as."""
