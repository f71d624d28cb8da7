"""Training data: images from label maps, prepared folders from public data sets, checks, shards, training samples."""
