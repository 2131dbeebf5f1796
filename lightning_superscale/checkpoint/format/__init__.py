"""The files of a universal checkpoint, byte for byte: manifest, data files, checksums and JSON values."""
