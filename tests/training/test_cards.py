"""The card's figures come from records."""

from __future__ import annotations

import json

import jinja2
import pytest

from hf_binaryformer.training.cards import checkpoint_card, sets_table


@pytest.fixture
def cards(tmp_path):
    names = ["summary", "usage", "network", "data", "results", "commands", "training", "limits"]
    sections = "\n".join(f"  {name}: text" for name in names if name != "results")
    metric = "- {dataset: d, name: mean, type: dice, value: '{{ results.rows.network.mean }}'}"
    results = "  results: |-\n    mean {{ results.rows.network.mean }}\n    {{ dice_table(results) }}"
    (tmp_path / "toy.yaml").write_text(
        f"task: image-segmentation\nmetrics:\n  {metric}\nsections:\n{sections}\n{results}\n"
    )
    evidence = tmp_path / "evidence" / "toy"
    evidence.mkdir(parents=True)
    labels = {"a": {"mean": 0.5, "sd": 0.1}, "b": {"mean": 0.7, "sd": 0.1}, "c": {"mean": 0.9, "sd": 0.1}}
    (evidence / "results.json").write_text(json.dumps({"rows": {"network": {"mean": 0.7, "labels": labels}}}))
    return tmp_path


def test_figures_come_from_the_records(cards):
    card = checkpoint_card("toy", cards)
    assert "mean 0.7" in card.text
    assert "| b | 0.700 ± 0.100 |" in card.text and "| **mean** | **0.700** |" in card.text
    assert card.data.eval_results[0].metric_value == 0.7
    assert "Research only, not for clinical use." in card.text
    assert card.data.pipeline_tag == "image-segmentation" and "# toy" in card.text


def test_a_figure_without_a_record_is_an_error(cards):
    (cards / "evidence" / "toy" / "results.json").unlink()
    with pytest.raises(jinja2.UndefinedError, match="results"):
        checkpoint_card("toy", cards)


def test_sets_show_means_of_groups_and_leave_out_labels_without_data():
    t1 = {"a": {"mean": 0.5}, "b": {"mean": 0.7}, "c": {"mean": None}}
    ct = {"a": {"mean": None}, "b": {"mean": 0.25}, "c": {"mean": None}}
    results = {"sets": {"t1": {"volumes": 3, "labels": t1}, "ct": {"volumes": 1, "labels": ct}}}
    assert sets_table(results, {"two": ["a", "b"], "third": ["c"]}).splitlines() == [
        "| set | volumes | two | third |",
        "| --- | ---: | ---: | ---: |",
        "| t1 | 3 | 0.600 | n/a |",
        "| ct | 1 | 0.250 | n/a |",
    ]
