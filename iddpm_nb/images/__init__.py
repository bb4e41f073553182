"""A folder of pictures: what a person sees in each file, and which files are pictures."""
