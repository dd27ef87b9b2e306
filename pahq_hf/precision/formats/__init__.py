"""Low-precision formats of weights, one file each, registered in one place."""
