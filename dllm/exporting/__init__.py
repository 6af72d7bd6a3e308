"""A checkpoint as a directory that other tools load, with a card that says where it comes from; and its upload."""
