"""Transformers models with 1-bit attention: configuration, attention, encoder, decoder, image processor, weights by name."""
