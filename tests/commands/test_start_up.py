"""The garbage collector is off while a network is loaded, and on again afterwards."""

from __future__ import annotations

import gc

import pytest

from hf_binaryformer.commands import jobs
from hf_binaryformer.commands.start_up import without_collection
from hf_binaryformer.pipelines.segmentation import VolumeSegmentationPipeline


@pytest.fixture(autouse=True)
def collector():
    """Leave it on, whatever a test did."""
    yield
    gc.enable()


def test_the_collector_is_off_inside_and_on_afterwards_even_after_an_error():
    with pytest.raises(KeyError), without_collection():
        assert not gc.isenabled()
        raise KeyError
    assert gc.isenabled()


def test_who_had_it_off_has_it_off_afterwards():
    gc.disable()
    with without_collection():
        pass
    assert not gc.isenabled()


def test_a_network_is_loaded_without_collections(monkeypatch):
    seen = []

    def refuse(*args, **kwargs):
        seen.append(gc.isenabled())
        raise FileNotFoundError

    monkeypatch.setattr(VolumeSegmentationPipeline, "from_pretrained", refuse)
    with pytest.raises(FileNotFoundError):
        jobs.load_pipeline("nowhere")
    assert seen == [False] and gc.isenabled()
