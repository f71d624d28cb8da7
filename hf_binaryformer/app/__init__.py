"""The web page: `binaryformer app` and the Space. Files in, labels or filled holes out, by the commands' own functions."""
