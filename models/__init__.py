"""Other models, one file each, for `model = "models.NAME:Class"` in a configuration."""
