"""The rules by which functions of torch compute with each rank's part of the tokens, one file per kind of function."""
