"""What decides edges: ACDC, attribution, sweeps, and the one pipeline every run goes through."""
