"""Training data: label maps to images, public data sets to prepared folders, checks, shards, and the samples drawn from them."""
