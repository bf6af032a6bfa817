"""Reading files that anybody may have made, and writing files that are complete or absent."""
