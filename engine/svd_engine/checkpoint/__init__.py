"""Where weights come from: a diffusers folder, the hub, or random numbers; configs and files."""
