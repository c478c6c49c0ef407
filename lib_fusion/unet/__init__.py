"""What is known about LDM-shaped U-Nets: building, loading and reading them."""
