"""What a process runs first that must do without this package, although it is installed."""

WITHOUT_PACKAGE = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_binaryformer":
            raise ModuleNotFoundError(f"{name} is not here")

sys.meta_path.insert(0, Blocker())
"""
