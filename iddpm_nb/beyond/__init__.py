"""Beyond the paper: the same network seen as the slope of a differential equation."""
