"""Models: nn.Module only, no files, no flags, no devices."""
