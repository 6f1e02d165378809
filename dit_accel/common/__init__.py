"""What all other packages may import: errors, files, signals, devices, and the description of attention layers."""
