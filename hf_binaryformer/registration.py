"""Makes transformers know this package after ``import hf_binaryformer``, without importing either of them sooner.

``import hf_binaryformer`` imports neither torch nor transformers. So what has to be told to transformers is told when the
module of transformers that keeps it has been imported, and this package's networks are imported when one is asked for.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MODEL_TYPE = "binaryformer"
TASK = "mri-segmentation"


def register_networks() -> None:
    """Import everything that adds itself to transformers' Auto classes."""
    for name in ("networks", "image_processing", "backbone"):
        import_module(f"hf_binaryformer.modeling.{name}")


class LazyEntries(dict[Any, Any]):
    """Entries that were added to one of transformers' mappings, and ours once somebody looks for them."""

    def __contains__(self, key: object) -> bool:
        if key == MODEL_TYPE and not super().__contains__(key):
            register_networks()
        return super().__contains__(key)

    def values(self) -> Any:
        """Image processors are looked for by the name of their class, among all of them."""
        register_networks()
        return super().values()


def know_models(module: ModuleType) -> None:
    """``AutoConfig`` finds our configuration, and with it every Auto class our networks."""
    module.CONFIG_MAPPING._extra_content = LazyEntries(module.CONFIG_MAPPING._extra_content)


def know_image_processors(module: ModuleType) -> None:
    """``AutoImageProcessor`` finds our processor, also if it is the first that is loaded."""
    module.IMAGE_PROCESSOR_MAPPING._extra_content = LazyEntries(module.IMAGE_PROCESSOR_MAPPING._extra_content)


def know_tasks(module: ModuleType) -> None:
    """``pipeline("mri-segmentation")``, and no complaint of ``pipeline("image-segmentation")`` about our network."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES

    from hf_binaryformer.pipelines.mri_segmentation import MRISegmentationPipeline

    MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES.setdefault(MODEL_TYPE, "BinaryFormerForSemanticSegmentation")
    if TASK not in module.PIPELINE_REGISTRY.supported_tasks:
        automatic = module.AutoModelForSemanticSegmentation
        module.PIPELINE_REGISTRY.register_pipeline(TASK, MRISegmentationPipeline, automatic, type="image")


ACTIONS: dict[str, Callable[[ModuleType], None]] = {
    "transformers.models.auto.configuration_auto": know_models,
    "transformers.models.auto.image_processing_auto": know_image_processors,
    "transformers.pipelines": know_tasks,
}


class AfterImport(MetaPathFinder):
    """Finds nothing itself, and has the action of a module follow its import."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The spec that the other finders have, with the action added."""
        if name not in ACTIONS:
            return None
        others: Iterable[Any] = (one for one in sys.meta_path if one is not self and hasattr(one, "find_spec"))
        spec = next((found for one in others if (found := one.find_spec(name, path, target))), None)
        if spec is None or spec.loader is None:
            return spec
        original = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            original(module)
            ACTIONS[name](module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Watch for the modules, and act at once for those that are there already."""
    for name, act in ACTIONS.items():
        if name in sys.modules:
            act(sys.modules[name])
    if not any(isinstance(one, AfterImport) for one in sys.meta_path):
        sys.meta_path.insert(0, AfterImport())
