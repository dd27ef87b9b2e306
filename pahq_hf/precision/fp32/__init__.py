"""Full-precision weights: where they come from and how they reach the device."""
