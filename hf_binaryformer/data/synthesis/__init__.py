"""Images synthesised from label maps: one engine, and a YAML file for each part of the body that it draws."""
