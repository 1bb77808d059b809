"""The hot loops: bytes in, bytes out. They know no file, no format and no model."""
